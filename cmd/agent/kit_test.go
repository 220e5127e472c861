//go:build linux || darwin

package main

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

func TestGuestKitBesideTheAgentComesBeforeTheInstalledOne(t *testing.T) {
	t.Parallel()
	near := t.TempDir()
	cfg := Config{StateDir: t.TempDir(), VM: VMConfig{GuestKit: "/configured"}}
	look := func(want string) {
		t.Helper()
		if got := guestKit(cfg, near); got != want {
			t.Errorf("guestKit() = %q, not %s", got, want)
		}
	}
	look("/configured")
	cfg.VM.GuestKit = ""
	look(filepath.Join(cfg.StateDir, "guest-kit", runtime.GOARCH)) // also while it is yet to be installed
	kit := filepath.Join(near, runtime.GOARCH)
	if err := os.MkdirAll(kit, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(kit, "guest.json"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	look(kit)
}
