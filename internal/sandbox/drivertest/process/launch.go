package process

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/guest/guestd"
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

// The descriptors that a shim inherits besides the standard ones.
const (
	mutexDescriptor  = 3 // the box's mutex, held until guestd runs
	reportDescriptor = 4 // the pipe on which it says whether it does
)

// guestDescriptor is that of the folder of the guest channel's sockets, which
// guestd inherits: the folder's path may be too long for a socket in it.
const guestDescriptor = 3

// started is what a shim reports when guestd runs.
const started = "started"

// launch starts a shim, and with it guestd. If ctx ends first, the shim
// goes on alone, and holds the mutex until it is done.
func (d *Driver) launch(ctx context.Context, m *mutex) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	faults, err := os.OpenFile(m.box.path("shim.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer faults.Close()
	report, reporter, err := os.Pipe()
	if err != nil {
		return err
	}
	defer report.Close()
	cmd := &exec.Cmd{
		Path: self,
		Args: []string{self, shimFlag, m.box.dir},
		Env: append(baseEnvironment(d.cfg.Root),
			// A thousand of them are to fit on a small machine.
			"GOMAXPROCS=1", "GOGC=50"),
		Dir:         "/",
		Stdout:      faults,
		Stderr:      faults,
		ExtraFiles:  []*os.File{m.file, reporter},
		SysProcAttr: detached(),
	}
	err = cmd.Start()
	reporter.Close()
	if err != nil {
		return err
	}
	reap(cmd)

	undo := context.AfterFunc(ctx, func() { _ = report.SetReadDeadline(time.Unix(1, 0)) })
	defer undo()
	said, err := io.ReadAll(report)
	switch {
	case string(said) == started:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return err
	case len(said) == 0:
		text, _ := os.ReadFile(faults.Name())
		return errors.New("its shim ended: " + strings.TrimSpace(string(text)))
	}
	return errors.New(string(said))
}

// baseEnvironment is that of every process of a sandbox. A binary built with
// the race detector would otherwise take a second to exit; see
// https://go.dev/doc/articles/race_detector on atexit_sleep_ms.
func baseEnvironment(root string) []string {
	return []string{"PATH=/usr/local/bin:/usr/bin:/bin", "GORACE=atexit_sleep_ms=0", rootVariable + "=" + root}
}

// rootOf returns the root of the driver whose box is at dir.
func rootOf(dir string) string { return filepath.Dir(filepath.Dir(filepath.Dir(dir))) }
