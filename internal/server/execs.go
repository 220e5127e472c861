package server

import (
	"cmp"
	"context"
	"errors"
	"io"
	"sync/atomic"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

type execService struct {
	agentv1.UnimplementedExecServiceServer
	manager *manager.Manager
}

// visit is what every call on a running sandbox begins with.
func visit(ctx context.Context, m *manager.Manager, name string) (*manager.Visit, error) {
	if err := sandbox.ValidateName("name", name); err != nil {
		return nil, err
	}
	return m.Visit(ctx, name)
}

func (s *execService) Exec(stream agentv1.ExecService_ExecServer) error {
	first, err := stream.Recv()
	if errors.Is(err, io.EOF) {
		return sandbox.Invalidf("start", "is missing")
	}
	if err != nil {
		return err
	}
	name := cmp.Or(first.GetStart().GetName(), first.GetAttach().GetName())
	if first.GetStart() == nil && first.GetAttach() == nil {
		return sandbox.Invalidf("start", "is missing: the first request is start or attach")
	}
	there, err := visit(stream.Context(), s.manager, name)
	if err != nil {
		return err
	}
	defer there.Leave()
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	exec, err := beginExec(ctx, there.Guest, first)
	if err != nil {
		return err
	}
	defer exec.Close()
	if err := stream.Send(&agentv1.ExecResponse{Message: &agentv1.ExecResponse_Started{
		Started: &agentv1.ExecStarted{ExecId: exec.ID, Generation: there.Generation, Pid: exec.PID},
	}}); err != nil {
		return err
	}
	if first.GetStart().GetDetached() {
		return nil
	}
	var detached atomic.Bool
	// It ends with the stream, which this method's return ends.
	go func() {
		if err := feed(stream, exec, &detached); err != nil {
			cancel(err)
		}
	}()
	err = relay(stream, exec)
	if detached.Load() {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil && stream.Context().Err() == nil {
		return cause // what was wrong with a request
	}
	return err
}

func beginExec(ctx context.Context, g *guest.Guest, first *agentv1.ExecRequest) (*guest.Exec, error) {
	if attach := first.GetAttach(); attach != nil {
		if attach.GetExecId() == "" {
			return nil, sandbox.Invalidf("attach.exec_id", "is missing")
		}
		return g.Attach(ctx, attach.GetExecId(), attach.GetSkipBacklog())
	}
	start := first.GetStart()
	if err := sandbox.ValidateCommand("start.command", start.GetCommand()); err != nil {
		return nil, err
	}
	if err := sandbox.ValidateEnv("start.env", start.GetEnv()); err != nil {
		return nil, err
	}
	if start.GetWorkingDir() != "" {
		if err := sandbox.ValidatePath("start.working_dir", start.GetWorkingDir()); err != nil {
			return nil, err
		}
	}
	if err := sandbox.ValidateUser("start.user", start.GetUser()); err != nil {
		return nil, err
	}
	exec, err := g.Exec(ctx, guest.Command{
		Args: start.GetCommand(), Env: start.GetEnv(), Dir: start.GetWorkingDir(), User: start.GetUser(),
		TTY: start.GetTty(), Size: sizeFromWire(start.GetTerminalSize()), Keep: start.GetKeep(), NoInput: start.GetNoStdin(),
		Detached: start.GetDetached(),
	})
	if said, ok := errors.AsType[*guest.Error](err); ok {
		return nil, &sandbox.FieldError{Field: "start", Problem: said.Message, Err: said.Sentinel}
	}
	return exec, err
}

func sizeFromWire(w *agentv1.TerminalSize) guest.Size {
	return guest.Size{Columns: w.GetColumns(), Rows: w.GetRows()}
}

// feed passes on what the caller says, until it says no more.
func feed(stream agentv1.ExecService_ExecServer, exec *guest.Exec, detached *atomic.Bool) error {
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			_ = exec.CloseInput() // if it has ended, Receive says how
			return nil
		}
		if err != nil {
			return err
		}
		switch message := req.GetMessage().(type) {
		case *agentv1.ExecRequest_Stdin:
			err = exec.Input(message.Stdin)
		case *agentv1.ExecRequest_Resize:
			err = exec.Resize(sizeFromWire(message.Resize))
		case *agentv1.ExecRequest_Signal:
			number, wrong := sandbox.ParseSignal("signal", message.Signal)
			if wrong != nil {
				return wrong
			}
			err = exec.Signal(number)
		case *agentv1.ExecRequest_Detach:
			// First, for guestd hangs up as soon as it is told.
			detached.Store(true)
			if err = exec.Detach(); err == nil {
				exec.Close()
				return nil
			}
			detached.Store(false)
		default:
			return sandbox.Invalidf("message", "is none of stdin, resize, signal and detach")
		}
		if err != nil {
			return nil //nolint:nilerr // It has ended, and Receive says how.
		}
	}
}

// relay passes on what the command prints, and how it ends.
func relay(stream agentv1.ExecService_ExecServer, exec *guest.Exec) error {
	for {
		output, err := exec.Receive()
		if err != nil {
			return err
		}
		var w agentv1.ExecResponse
		switch {
		case output.Exit != nil:
			w.Message = &agentv1.ExecResponse_Exit{Exit: exitToWire(output.Exit)}
		case len(output.Data) == 0:
			continue // the end of one stream; the exit follows
		case output.Stderr:
			w.Message = &agentv1.ExecResponse_Stderr{Stderr: output.Data}
		default:
			w.Message = &agentv1.ExecResponse_Stdout{Stdout: output.Data}
		}
		if err := stream.Send(&w); err != nil || output.Exit != nil { // encodes Data before it returns
			return err
		}
	}
}

func exitToWire(exit *guest.Exit) *agentv1.ExecExit {
	if exit == nil {
		return nil
	}
	return &agentv1.ExecExit{Code: exit.Code, Signal: exit.Signal}
}

func (s *execService) ListExecs(ctx context.Context, req *agentv1.ListExecsRequest) (*agentv1.ListExecsResponse, error) {
	there, err := visit(ctx, s.manager, req.GetName())
	if err != nil {
		return nil, err
	}
	defer there.Leave()
	execs, err := there.Guest.Execs(ctx)
	if err != nil {
		return nil, err
	}
	var answer agentv1.ListExecsResponse
	for _, e := range execs {
		answer.Execs = append(answer.Execs, &agentv1.ExecSession{
			ExecId: e.ID, Command: e.Command, Pid: e.PID, Tty: e.TTY, Attached: e.Attached,
			StartTime: timeToWire(e.Started), Exit: exitToWire(e.Exit),
		})
	}
	return &answer, nil
}

func (s *execService) SignalExec(ctx context.Context, req *agentv1.SignalExecRequest) (*agentv1.SignalExecResponse, error) {
	if req.GetExecId() == "" {
		return nil, sandbox.Invalidf("exec_id", "is missing")
	}
	number, err := sandbox.ParseSignal("signal", cmp.Or(req.GetSignal(), "TERM"))
	if err != nil {
		return nil, err
	}
	there, err := visit(ctx, s.manager, req.GetName())
	if err != nil {
		return nil, err
	}
	defer there.Leave()
	if err := there.Guest.SignalExec(ctx, req.GetExecId(), number); err != nil {
		return nil, err
	}
	return &agentv1.SignalExecResponse{}, nil
}
