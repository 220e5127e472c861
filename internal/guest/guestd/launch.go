//go:build linux

package guestd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

// launch starts a command for an Exec. Its output is not read before follow.
func (e *execs) launch(call *guestv1.Exec) (*execution, error) {
	if phase, _ := e.workload.state(); phase == guestv1.Greeting_PHASE_WAITING {
		return nil, failuref(guestv1.Failure_CODE_STATE, "the workload was not started yet")
	}
	plan, err := e.plan(call)
	if err != nil {
		return nil, err
	}
	x := &execution{
		execs: e, command: call.GetCommand(), tty: call.GetTty(), keep: call.GetKeep(),
		started: time.Now(), drain: drain{buffers: e.buffers, exited: make(chan struct{})},
	}
	x.take = x.deliver
	if err := e.enter(x); err != nil {
		return nil, err
	}
	theirs, err := x.open(call)
	if err == nil {
		err = e.start(x, plan, theirs)
	}
	closeAll(theirs)
	if err != nil {
		x.close()
		e.fail()
		return nil, err
	}
	e.add(x)
	return x, nil
}

// plan is how a command is to be started.
type plan struct {
	path       string
	args       []string
	dir        string
	env        []string
	credential *syscall.Credential
}

func (e *execs) plan(call *guestv1.Exec) (plan, error) {
	if len(call.GetCommand()) == 0 {
		return plan{}, failuref(guestv1.Failure_CODE_INVALID, "command: empty")
	}
	for _, arg := range call.GetCommand() {
		if strings.Contains(arg, "\x00") {
			return plan{}, failuref(guestv1.Failure_CODE_INVALID, "command: an argument has a zero byte")
		}
	}
	credential, home, err := e.workload.become(call.GetUser())
	if err != nil {
		return plan{}, err
	}
	env, err := e.environment(call, home)
	if err != nil {
		return plan{}, err
	}
	p := plan{args: call.GetCommand(), dir: call.GetWorkingDir(), env: env, credential: credential}
	if p.dir != "" {
		p.dir = absolute(p.dir, e.workload.dir)
		if err := checkDir(p.dir); err != nil {
			return plan{}, err
		}
	}
	p.path, err = lookup(p.args[0], absolute(p.dir, e.workload.dir), env)
	return p, err
}

// environment is the workload's, with HOME for another user and TERM for a
// terminal where nothing else says them, and what the call sets.
func (e *execs) environment(call *guestv1.Exec, home string) ([]string, error) {
	env := e.workload.environment()
	var set []string
	if home != "" {
		set = append(set, "HOME="+home)
	}
	if call.GetTty() && variable(env, "TERM") == "" {
		set = append(set, "TERM=xterm")
	}
	overrides, err := environmentOf(call.GetEnv())
	if err != nil {
		return nil, err
	}
	if set = append(set, overrides...); len(set) == 0 {
		return env, nil
	}
	return merge(env, set), nil
}

func (e *execs) start(x *execution, p plan, files []int) error {
	attr := &syscall.ProcAttr{Dir: p.dir, Env: p.env, Sys: &syscall.SysProcAttr{
		// A session of its own, by which all that it starts can be found.
		Setsid: true, Setctty: x.tty, Ctty: 0, Credential: p.credential,
	}}
	for _, fd := range files {
		attr.Files = append(attr.Files, uintptr(fd)) //nolint:gosec // A descriptor that is open.
	}
	giveAway(files, p.credential)
	pid, err := e.children.start(p.path, p.args, attr, x.onExit)
	if err != nil {
		return fmt.Errorf("%s: %w", p.args[0], startError(err))
	}
	x.mu.Lock()
	x.pid = pid
	x.mu.Unlock()
	return nil
}

// giveAway makes a command's streams its user's, as login does with terminals,
// so that it can open /dev/stdout. Who may not do that can still use them.
func giveAway(files []int, credential *syscall.Credential) {
	if credential == nil {
		return
	}
	for _, fd := range files {
		var stat unix.Stat_t
		if unix.Fstat(fd, &stat) == nil && stat.Rdev != nullDevice {
			_ = unix.Fchown(fd, int(credential.Uid), -1)
		}
	}
}

// nullDevice is /dev/null, which is everybody's.
var nullDevice = unix.Mkdev(1, 3)

// open makes what the command is to have as its standard input, output and
// error, and returns those descriptors; x has the other ends.
func (x *execution) open(call *guestv1.Exec) (theirs []int, err error) {
	if x.tty {
		master, slave, err := openTerminal(call.GetSize())
		if err != nil {
			return nil, err
		}
		x.output, x.input = master, master
		return []int{slave, slave, slave}, nil
	}
	theirs = make([]int, 0, 3)
	if call.GetNoInput() {
		fd, err := noInput()
		if err != nil {
			return theirs, err
		}
		theirs = append(theirs, fd)
	} else {
		var ends [2]int
		if err := unix.Pipe2(ends[:], unix.O_CLOEXEC); err != nil {
			return theirs, fmt.Errorf("open a pipe: %w", err)
		}
		x.input = ours(ends[1])
		theirs = append(theirs, ends[0])
	}
	return openOutput(theirs, &x.output, &x.errors)
}

// openOutput makes pipes, and returns theirs with the ends to write to.
func openOutput(theirs []int, output, errs **os.File) ([]int, error) {
	for _, file := range []**os.File{output, errs} {
		var ends [2]int
		if err := unix.Pipe2(ends[:], unix.O_CLOEXEC); err != nil {
			return theirs, fmt.Errorf("open a pipe: %w", err)
		}
		*file = ours(ends[0])
		theirs = append(theirs, ends[1])
	}
	return theirs, nil
}

// ours makes an end of a pipe one that can be waited for with a deadline.
func ours(fd int) *os.File {
	_ = unix.SetNonblock(fd, true)
	return os.NewFile(uintptr(fd), "pipe") //nolint:gosec // A descriptor that is open.
}

// noInput returns what is at its end at once, where there is no /dev, too.
func noInput() (int, error) {
	if fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		return fd, nil
	}
	var ends [2]int
	if err := unix.Pipe2(ends[:], unix.O_CLOEXEC); err != nil {
		return -1, fmt.Errorf("open a pipe: %w", err)
	}
	_ = unix.Close(ends[1])
	return ends[0], nil
}

// closeAll closes descriptors, those that are in the list again once.
func closeAll(fds []int) {
	last := -1
	for _, fd := range fds {
		if fd != last {
			_ = unix.Close(fd)
		}
		last = fd
	}
}

// run runs a command with no input, drops what it prints, and returns its exit
// code. If ctx ends first, the command is killed.
func (e *execs) run(ctx context.Context, command []string) (int, error) {
	x, err := e.launch(&guestv1.Exec{Command: command, NoInput: true})
	if err != nil {
		return 0, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		x.follow()
	}()
	select {
	case <-done:
		if x.exit == nil {
			return 0, errors.New("the sandbox is ending")
		}
		return int(x.exit.GetCode()), nil
	case <-ctx.Done():
		x.hangUp()
		<-done
		return 0, ctx.Err()
	}
}
