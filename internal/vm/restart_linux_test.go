package vm_test

import (
	"context"
	"runtime"
	"testing"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/vmtest"
)

// TestGuestThatPanicsAndRestartsEndsItsMachine is of hypervisors that boot a
// guest anew which has reset its machine, and tell nobody.
func TestGuestThatPanicsAndRestartsEndsItsMachine(t *testing.T) {
	if testing.Short() {
		t.Skip("it boots machines")
	}
	if runtime.GOARCH != "amd64" {
		t.Skip("the machine that reboots is for amd64")
	}
	root := vmtest.Backend(t)
	config, err := vmtest.Rebooting(root)
	if err != nil {
		t.Fatal(err)
	}
	d, err := vm.New(config)
	if err != nil {
		t.Fatal(err)
	}
	v := newVictim(t, d, root, "panics", nil, "sleep")
	v.up()
	v.answers()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	// It may be too late for an answer.
	_, _ = v.guest().Exec(ctx, guest.Command{Args: []string{"/workload", "write", "/proc/sysrq-trigger", "c"}, NoInput: true})
	v.exited(137, "the guest restarted", "its console said last", "Kernel panic - not syncing: sysrq")
	v.up() // a life of its own
	v.answers()
}
