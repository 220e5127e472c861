//go:build linux

package qemu

import (
	"runtime"
	"testing"
)

// What runs under emulation everywhere is what KVM is tried with.
func TestTinyGuestComesToItsEnd(t *testing.T) {
	t.Parallel()
	path, err := Options{}.qemuPath(runtime.GOARCH)
	if err != nil {
		t.Skip(err)
	}
	if err := runTiny(t.Context(), path, runtime.GOARCH, TCG); err != nil {
		t.Error(err)
	}
}
