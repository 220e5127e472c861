package main

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

func TestKitBesideAnAgentIsFoundThroughLinks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	agent, link := filepath.Join(dir, "agent"), filepath.Join(t.TempDir(), "agent")
	kit := filepath.Join(dir, "guest-kit", runtime.GOARCH)
	for _, err := range []error{os.WriteFile(agent, nil, 0o700), os.Symlink(agent, link), os.MkdirAll(kit, 0o700)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if got := kitBeside(link); got != "" {
		t.Errorf("an empty folder is a kit: %s", got)
	}
	if err := os.WriteFile(filepath.Join(kit, "guest.json"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{agent, link} {
		if got := kitBeside(program); got != kit {
			t.Errorf("kitBeside(%s) = %q, not %s", program, got, kit)
		}
	}
	if got := kitBeside(filepath.Join(dir, "none")); got != "" {
		t.Errorf("no agent has %s", got)
	}
}
