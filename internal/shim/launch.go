package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// Program is what a shim is started as.
type Program struct {
	// Args come after the program's name, the box's folder last of all. The
	// program is this process's own.
	Args []string
	// Env is the whole environment.
	Env []string
}

// The descriptors that a shim inherits besides the standard ones.
const (
	mutexDescriptor  = 3 // the box's mutex, held until the sandbox runs
	reportDescriptor = 4 // the pipe on which it says whether it does
)

// started is what a shim reports when its sandbox runs.
const started = "started"

// Start starts a sandbox's next life, unless it runs; see sandbox.Driver. If
// ctx ends first, the shim goes on alone, and holds the mutex until it is done.
func (m *Mutex) Start(ctx context.Context, program Program) error {
	o, _, err := m.box.Observe()
	switch {
	case err != nil:
		return err
	case o.State == sandbox.StateAbsent:
		return sandbox.ErrNotFound
	case o.State == sandbox.StateBroken:
		return fmt.Errorf("%w: half of it is missing; delete it", sandbox.ErrState)
	case o.State == sandbox.StateRunning:
		return nil
	}
	if err := m.box.bury(o); err != nil {
		return err
	}
	return m.launch(ctx, program)
}

func (m *Mutex) launch(ctx context.Context, program Program) error {
	faults, err := os.OpenFile(m.box.Path(faultsFile), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer faults.Close()
	before, err := faults.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	report, reporter, err := os.Pipe()
	if err != nil {
		return err
	}
	defer report.Close()
	path, err := self()
	if err != nil {
		return err
	}
	cmd := &exec.Cmd{
		Path:        path,
		Args:        append(append([]string{os.Args[0]}, program.Args...), m.box.Dir),
		Env:         program.Env,
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
		return silent(faults.Name(), before)
	}
	return decodeReport(said)
}

// silent is a shim that ended and did not say why, but for what it may have
// printed to faults.
func silent(faults string, before int64) error {
	text, _ := os.ReadFile(faults)
	if printed := strings.TrimSpace(string(text[min(before, int64(len(text))):])); printed != "" {
		return errors.New("its shim ended: " + printed)
	}
	return errors.New("its shim was killed")
}

// A report of failure is what went wrong, behind the name of the sentinel that
// its error wraps, if it is one of these.
var reported = map[string]error{
	"invalid": sandbox.ErrInvalid, "unavailable": sandbox.ErrUnavailable,
	"exhausted": sandbox.ErrExhausted, "state": sandbox.ErrState,
}

func encodeReport(err error) string {
	for name, sentinel := range reported {
		if errors.Is(err, sentinel) {
			return name + "\x00" + err.Error()
		}
	}
	return "\x00" + err.Error()
}

func decodeReport(said []byte) error {
	name, text, _ := strings.Cut(string(said), "\x00")
	return &reportError{text, reported[name]}
}

// reportError is an error of another process.
type reportError struct {
	text     string
	sentinel error // may be nil
}

func (e *reportError) Error() string { return e.text }

func (e *reportError) Unwrap() error { return e.sentinel }
