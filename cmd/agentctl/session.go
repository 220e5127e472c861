package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

const (
	// inputChunk is how much of stdin is sent at once; the API takes 1 MiB.
	inputChunk = 32 << 10
	// detachTimeout is how long the agent has to end a call that was detached.
	detachTimeout = 5 * time.Second
)

// errDetached is the cause of the end of a call whose command was left running.
var errDetached = errors.New("detached")

// session is one call of ExecService.Exec: a command inside a sandbox, tied to
// the streams of this process.
type session struct {
	a    *app
	c    *client
	name string // the sandbox
	tty  bool   // the command has a terminal
	keep bool   // the command outlives the call

	input bool   // stdin is passed on
	keys  []byte // typed, they detach; empty: nothing does

	sending sync.Mutex
	stream  interface {
		Send(*agentv1.ExecRequest) error
		Recv() (*agentv1.ExecResponse, error)
		CloseSend() error
	}
	leave   context.CancelCauseFunc
	started *agentv1.ExecStarted
	raw     *rawMode // nil: the terminal is as it was, or is none
}

// run makes the call and returns once the command has ended, as an error with
// its exit status unless that is zero, or was left running, as nil.
func (s *session) run(ctx context.Context, first *agentv1.ExecRequest) error {
	inner, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	s.leave = leave
	stream, err := s.c.execs.Exec(inner)
	if err == nil {
		s.stream = stream
		err = s.begin(first)
	}
	if err != nil {
		return s.failure(ctx, err)
	}
	if first.GetStart().GetDetached() {
		return s.told()
	}
	release, err := s.connect(inner)
	if err != nil {
		return err
	}
	exit, err := s.copyOutput()
	release()
	switch {
	case errors.Is(context.Cause(inner), errDetached) || err == nil && exit == nil:
		s.a.notef("%s runs on; agentctl exec attach %s %s takes it up again", s.started.GetExecId(), s.name, s.started.GetExecId())
		return nil
	case err != nil:
		return s.failure(ctx, err)
	case exit.GetCode() == 0:
		return nil
	}
	return &reported{fmt.Errorf("exit status %d", exit.GetCode()), int(exit.GetCode())}
}

// begin sends the first request and reads the first answer.
func (s *session) begin(first *agentv1.ExecRequest) error {
	// An error of Send is io.EOF: what Recv returns says more.
	err := s.stream.Send(first)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	answer, err := s.stream.Recv()
	if err != nil {
		return err
	}
	if s.started = answer.GetStarted(); s.started == nil {
		return errors.New("the agent did not say that the command started")
	}
	return nil
}

// told prints the id of a command that was left running from the start.
func (s *session) told() error {
	if s.a.forPrograms() {
		return s.a.print(s.started)
	}
	_, err := fmt.Fprintln(s.a.stdout, s.started.GetExecId())
	return err
}

// connect ties the command to the terminal, stdin and signals of this process,
// until release.
func (s *session) connect(ctx context.Context) (release func(), err error) {
	var undo []func()
	release = func() {
		for _, f := range undo {
			f()
		}
	}
	keyboard := terminalOf(s.a.stdin)
	if s.tty && s.input && keyboard != nil {
		if s.raw, err = s.a.makeRaw(keyboard, ""); err != nil {
			return release, err
		}
		undo = append(undo, s.raw.restore)
	} else {
		s.keys = nil
		undo = append(undo, s.a.signals.take(func(sig os.Signal) { s.signal(ctx, sig) },
			syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2))
	}
	if s.tty {
		s.resize()
		undo = append(undo, s.a.signals.watch(func(os.Signal) { s.resize() }, syscall.SIGWINCH))
	}
	if s.input {
		// Nobody waits for it: a read of stdin cannot be cut short.
		go s.copyInput()
	}
	return release, nil
}

// signal passes a signal on to the command. It goes by a call of its own,
// which input that the command does not read cannot hold up.
func (s *session) signal(ctx context.Context, sig os.Signal) {
	number, _ := sig.(syscall.Signal)
	names := map[syscall.Signal]string{
		syscall.SIGINT: "INT", syscall.SIGTERM: "TERM", syscall.SIGHUP: "HUP",
		syscall.SIGQUIT: "QUIT", syscall.SIGUSR1: "USR1", syscall.SIGUSR2: "USR2",
	}
	ctx, cancel := quick(ctx)
	defer cancel()
	_, err := s.c.execs.SignalExec(ctx, &agentv1.SignalExecRequest{Name: s.name, ExecId: s.started.GetExecId(), Signal: names[number]})
	if _, unreachable := errors.AsType[*connectError](err); unreachable {
		s.leave(interrupted{number}) // there is nobody to wait for
	} else if err != nil && reasonOf(err) != "NOT_FOUND" && reasonOf(err) != "WRONG_STATE" && ctx.Err() == nil {
		s.a.notef("SIG%s was not passed on: %s", names[number], message(err))
	}
}

// resize tells the command how large the terminal is.
func (s *session) resize() {
	if size := terminalSize(s.a.stdout, s.a.stdin); size != nil {
		_ = s.send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Resize{Resize: size}}) // Recv says why
	}
}

func (s *session) send(req *agentv1.ExecRequest) error {
	s.sending.Lock()
	defer s.sending.Unlock()
	return s.stream.Send(req)
}

// leaveRunning asks the agent to end the call and not the command.
func (s *session) leaveRunning() error {
	err := s.send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Detach{Detach: &agentv1.ExecDetach{}}})
	time.AfterFunc(detachTimeout, func() { s.leave(errDetached) })
	return err
}

// copyInput passes stdin on until its end, which it passes on too, or until
// the keys that detach were typed.
func (s *session) copyInput() {
	defer s.raw.guard()
	filter := &keyFilter{keys: s.keys}
	chunk := make([]byte, inputChunk)
	for {
		n, readErr := s.a.stdin.Read(chunk)
		pass, complete := filter.feed(chunk[:n])
		if len(pass) > 0 {
			if s.send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Stdin{Stdin: pass}}) != nil {
				return // Recv says why
			}
		}
		if complete {
			_ = s.leaveRunning()
			return
		}
		if readErr != nil {
			s.sending.Lock()
			defer s.sending.Unlock()
			_ = s.stream.CloseSend()
			return
		}
	}
}

// copyOutput prints what the command prints until it ends. exit is nil if the
// call ended and the command did not.
func (s *session) copyOutput() (exit *agentv1.ExecExit, err error) {
	for {
		answer, err := s.stream.Recv()
		if errors.Is(err, io.EOF) {
			return exit, nil
		}
		if err != nil {
			return nil, err
		}
		switch m := answer.GetMessage().(type) {
		case *agentv1.ExecResponse_Stdout:
			_, err = s.a.stdout.Write(m.Stdout)
		case *agentv1.ExecResponse_Stderr:
			_, err = s.a.stderr.Write(m.Stderr)
		case *agentv1.ExecResponse_Exit:
			return m.Exit, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// failure says why a call failed, and what became of the command.
func (s *session) failure(ctx context.Context, err error) error {
	gone := lost(err)
	err = s.c.link.explain(ctx, err)
	switch {
	case s.started == nil:
		return s.commandFailure(ctx, err)
	case !gone && ctx.Err() == nil:
		return err
	case gone:
		err = &connectError{s.c.address, errors.New("the connection was lost while the command ran")}
	}
	if s.keep {
		return withHint(err, "agentctl exec attach %s %s", s.name, s.started.GetExecId())
	}
	return err
}

// commandFailure gives a command that cannot be run the exit status that a
// shell has for it.
func (s *session) commandFailure(ctx context.Context, err error) error {
	name := s.name
	if !s.c.inside(ctx, err, name) {
		return err
	}
	switch reasonOf(err) {
	case "NOT_FOUND":
		return &exitingWith{withHint(err, "another spelling, or its whole path; agentctl file list %s /usr/bin shows what there is", name), exitNoCommand}
	case "PERMISSION_DENIED":
		return &exitingWith{withHint(err, "agentctl sandbox exec %s -- sh FILE, or make it executable inside", name), exitNotExecutable}
	}
	return err
}

// noCommand reports whether err is a command that is not there.
func noCommand(err error) bool {
	own, ok := errors.AsType[*exitingWith](err)
	return ok && own.exit == exitNoCommand
}
