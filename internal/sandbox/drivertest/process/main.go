package process

import (
	"os"
	"syscall"

	"github.com/choiros/agent/internal/guest/guestd"
	"github.com/choiros/agent/internal/shim"
)

// What Main looks for. A binary that does not call Main takes it for an
// unknown flag and ends.
const (
	shimFlag     = "-process-shim"
	guestdFlag   = "-process-guestd"
	workloadFlag = "-process-workload"
)

// rootVariable marks the environment of every process that runs for a sandbox
// with the root it belongs to.
const rootVariable = "AGENT_PROCESS_ROOT"

// Main takes over if this process was started as a shim, as guestd or as a
// standard workload, and exits; else it returns at once. Every binary that starts
// sandboxes calls it first of all, a test binary in TestMain.
func Main() {
	if len(os.Args) < 2 {
		return
	}
	switch os.Args[1] {
	case shimFlag:
		os.Exit(runShim(os.Args[2:]))
	case guestdFlag:
		// Not for the workload.
		syscall.CloseOnExec(guestDescriptor)
		os.Exit(guestd.Run(os.Args[2:], os.Stdout, os.Stderr))
	case workloadFlag:
		os.Exit(runWorkload(os.Args[2:], os.Stdout, os.Stderr))
	}
}

// guestDescriptor is that of the folder of the guest channel's sockets, which
// guestd inherits: the folder's path may be too long for a socket in it.
const guestDescriptor = 3

// shim is what shims are started as.
func (d *Driver) shim() shim.Program {
	return shim.Program{
		Args: []string{shimFlag},
		// A thousand of them are to fit on a small machine.
		Env: append(baseEnvironment(d.cfg.Root), "GOMAXPROCS=1", "GOGC=50"),
	}
}

// baseEnvironment is that of every process of a sandbox. A binary built with
// the race detector would otherwise take a second to exit; see
// https://go.dev/doc/articles/race_detector on atexit_sleep_ms.
func baseEnvironment(root string) []string {
	return []string{"PATH=/usr/local/bin:/usr/bin:/bin", "GORACE=atexit_sleep_ms=0", rootVariable + "=" + root}
}
