package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

// fakeExec is a command inside a fake sandbox: a real child process, with a
// real terminal if it is to have one.
type fakeExec struct {
	session *agentv1.ExecSession
	cmd     *exec.Cmd
	input   io.WriteCloser // nil: none
	tty     *os.File       // nil: none

	mu    sync.Mutex
	out   []*agentv1.ExecResponse // all that it printed, and its exit
	read  int                     // of out
	grown chan struct{}
	ended chan struct{}
}

func (e *fakeExec) push(r *agentv1.ExecResponse) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if exit := r.GetExit(); exit != nil {
		e.session.Exit = exit
	}
	e.out = append(e.out, r)
	close(e.grown)
	e.grown = make(chan struct{})
}

func (e *fakeExec) collect(from io.Reader, message func([]byte) *agentv1.ExecResponse) {
	for {
		chunk := make([]byte, 4096)
		n, err := from.Read(chunk)
		if n > 0 {
			e.push(message(chunk[:n]))
		}
		if err != nil {
			return
		}
	}
}

// startExec starts a command in the sandbox's folder.
func (s *fakeSandbox) startExec(start *agentv1.ExecStart) (*fakeExec, error) {
	s.agent.mu.Lock()
	defer s.agent.mu.Unlock()
	if s.running == nil {
		return nil, fmt.Errorf("exec in %s: it does not run: %w", s.sb.GetName(), sandbox.ErrState)
	}
	if start.GetUser() == "nobody-here" {
		return nil, sandbox.Unsupportedf("user", "this sandbox may not change users")
	}
	command := start.GetCommand()
	path, err := exec.LookPath(command[0])
	if slices.Contains(s.agent.noPrograms, command[0]) {
		err = exec.ErrNotFound
	}
	switch {
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("exec in %s: %s: %w", s.sb.GetName(), command[0], sandbox.ErrDenied)
	case err != nil:
		return nil, fmt.Errorf("exec in %s: %s: %w", s.sb.GetName(), command[0], sandbox.ErrNotFound)
	}
	s.execs++
	e := &fakeExec{cmd: exec.Command(path, command[1:]...), grown: make(chan struct{}), ended: make(chan struct{})}
	e.cmd.Args[0], e.cmd.Dir = command[0], start.GetWorkingDir()
	e.cmd.Env = append(os.Environ(), "EXEC_USER="+start.GetUser(), "TERM=")
	for _, name := range slices.Sorted(maps.Keys(start.GetEnv())) {
		e.cmd.Env = append(e.cmd.Env, name+"="+start.GetEnv()[name])
	}
	e.session = &agentv1.ExecSession{ExecId: fmt.Sprintf("e%d", s.execs), Command: command, Tty: start.GetTty(), StartTime: timestamppb.Now()}
	if err := e.launch(start); err != nil {
		return nil, err
	}
	e.mu.Lock()
	e.session.Pid = int32(e.cmd.Process.Pid)
	e.mu.Unlock()
	if s.commands == nil {
		s.commands = map[string]*fakeExec{}
	}
	s.commands[e.session.GetExecId()] = e
	return e, nil
}

// launch starts the process and what collects its output.
func (e *fakeExec) launch(start *agentv1.ExecStart) error {
	stdout := func(b []byte) *agentv1.ExecResponse {
		return &agentv1.ExecResponse{Message: &agentv1.ExecResponse_Stdout{Stdout: b}}
	}
	stderr := func(b []byte) *agentv1.ExecResponse {
		return &agentv1.ExecResponse{Message: &agentv1.ExecResponse_Stderr{Stderr: b}}
	}
	var readers sync.WaitGroup
	if start.GetTty() {
		ours, theirs, err := openPTY()
		if err != nil {
			return err
		}
		defer theirs.Close()
		e.tty, e.input = ours, ours
		if size := start.GetTerminalSize(); size != nil {
			e.resize(size)
		}
		e.cmd.Stdin, e.cmd.Stdout, e.cmd.Stderr = theirs, theirs, theirs
		e.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
		if err := e.cmd.Start(); err != nil {
			return err
		}
		readers.Go(func() { e.collect(ours, stdout) })
	} else {
		e.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		out, outErr := e.cmd.StdoutPipe()
		errs, errsErr := e.cmd.StderrPipe()
		if err := errors.Join(outErr, errsErr); err != nil {
			return err
		}
		if !start.GetNoStdin() {
			var err error
			if e.input, err = e.cmd.StdinPipe(); err != nil {
				return err
			}
		}
		if err := e.cmd.Start(); err != nil {
			return err
		}
		readers.Go(func() { e.collect(out, stdout) })
		readers.Go(func() { e.collect(errs, stderr) })
	}
	go func() {
		readers.Wait()
		_ = e.cmd.Wait()
		exit := &agentv1.ExecExit{Code: int32(e.cmd.ProcessState.ExitCode())}
		if status := e.cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signaled() {
			exit.Signal, exit.Code = int32(status.Signal()), 128+int32(status.Signal())
		}
		e.push(&agentv1.ExecResponse{Message: &agentv1.ExecResponse_Exit{Exit: exit}})
		close(e.ended)
	}()
	return nil
}

func (e *fakeExec) kill() {
	_ = syscall.Kill(-e.cmd.Process.Pid, syscall.SIGKILL)
	<-e.ended
}

func (f *fakeAgent) Exec(stream grpc.BidiStreamingServer[agentv1.ExecRequest, agentv1.ExecResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	name := first.GetStart().GetName() + first.GetAttach().GetName()
	s, err := f.get(name)
	if err != nil {
		return err
	}
	e, keep := (*fakeExec)(nil), true
	if start := first.GetStart(); start != nil {
		if e, err = s.startExec(start); err != nil {
			return fail(err, name)
		}
		keep = start.GetKeep()
	} else if e, err = s.exec(first.GetAttach().GetExecId()); err != nil {
		return err
	}
	e.mu.Lock()
	e.session.Attached = true
	if first.GetAttach().GetSkipBacklog() {
		e.read = len(e.out)
	}
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		e.session.Attached = false
		e.mu.Unlock()
	}()
	started := &agentv1.ExecStarted{ExecId: e.session.GetExecId(), Generation: 1, Pid: e.session.GetPid()}
	if err := stream.Send(&agentv1.ExecResponse{Message: &agentv1.ExecResponse_Started{Started: started}}); err != nil {
		return err
	}
	if first.GetStart().GetDetached() {
		return nil
	}
	detached := make(chan struct{})
	go e.serve(stream, detached)
	for {
		e.mu.Lock()
		news, grown := slices.Clone(e.out[e.read:]), e.grown
		e.mu.Unlock()
		for _, r := range news {
			if err := stream.Send(r); err != nil {
				break
			}
			e.mu.Lock()
			e.read++
			e.mu.Unlock()
			if r.GetExit() != nil {
				return nil
			}
		}
		select {
		case <-grown:
		case <-detached:
			return nil
		case <-stream.Context().Done():
			if !keep {
				e.kill()
			}
			return stream.Context().Err()
		}
	}
}

// serve does what the caller says until it has said all.
func (e *fakeExec) serve(stream grpc.BidiStreamingServer[agentv1.ExecRequest, agentv1.ExecResponse], detached chan struct{}) {
	for {
		req, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF) && e.input != nil && e.tty == nil:
			_ = e.input.Close()
			return
		case err != nil:
			return
		case req.GetDetach() != nil:
			close(detached)
			return
		case req.GetResize() != nil && e.tty != nil:
			e.resize(req.GetResize())
		case req.GetStdin() != nil && e.input != nil:
			_, _ = e.input.Write(req.GetStdin())
		}
	}
}

// exec returns a command of the sandbox's.
func (s *fakeSandbox) exec(id string) (*fakeExec, error) {
	s.agent.mu.Lock()
	defer s.agent.mu.Unlock()
	if e := s.commands[id]; e != nil {
		return e, nil
	}
	return nil, fail(&sandbox.FieldError{Field: "exec_id", Problem: "there is no such command", Err: sandbox.ErrNotFound}, s.sb.GetName())
}

func (f *fakeAgent) ListExecs(_ context.Context, req *agentv1.ListExecsRequest) (*agentv1.ListExecsResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	answer := &agentv1.ListExecsResponse{}
	for _, id := range slices.Sorted(maps.Keys(s.commands)) {
		e := s.commands[id]
		e.mu.Lock()
		answer.Execs = append(answer.Execs, cloneSession(e.session))
		e.mu.Unlock()
	}
	return answer, nil
}

func cloneSession(e *agentv1.ExecSession) *agentv1.ExecSession {
	return &agentv1.ExecSession{
		ExecId: e.GetExecId(), Command: e.GetCommand(), Pid: e.GetPid(), Tty: e.GetTty(), Attached: e.GetAttached(), StartTime: e.GetStartTime(), Exit: e.GetExit(),
	}
}

func (f *fakeAgent) SignalExec(_ context.Context, req *agentv1.SignalExecRequest) (*agentv1.SignalExecResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	e, err := s.exec(req.GetExecId())
	if err != nil {
		return nil, err
	}
	number, err := sandbox.ParseSignal("signal", req.GetSignal())
	if err != nil {
		return nil, fail(err, req.GetName())
	}
	_ = syscall.Kill(-e.cmd.Process.Pid, syscall.Signal(number))
	return &agentv1.SignalExecResponse{}, nil
}

// dir is the sandbox's file system: a folder of this host.
func (s *fakeSandbox) dir() string { return filepath.Join(s.agent.disk, s.sb.GetName()) }
