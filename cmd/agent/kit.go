//go:build linux || darwin

package main

import (
	"os"
	"path/filepath"
	"runtime"
)

// kitName is the folder of guest kits, one for each architecture: beside the
// agent, or in the state directory.
const kitName = "guest-kit"

// guestKit is the folder of the guest kit: the one that is configured, or the
// one in a folder near this program, which is of its own release, or, where
// there is none, the one that agentctl installs, now or later.
func guestKit(cfg Config, near string) string {
	if cfg.VM.GuestKit != "" {
		return cfg.VM.GuestKit
	}
	kit := filepath.Join(near, runtime.GOARCH)
	if _, err := os.Stat(filepath.Join(kit, "guest.json")); err == nil {
		return kit
	}
	return filepath.Join(cfg.StateDir, kitName, runtime.GOARCH)
}
