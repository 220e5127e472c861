package main

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

const (
	// consoleKeys detach from a console: one key, that few programs want.
	consoleKeys = "ctrl-]"
	// consoleSilence is how long a console is listened to, once there is no more
	// input, after the last that it said.
	consoleSilence = time.Second
)

func (a *app) sandboxConsole() *cobra.Command {
	keys := ""
	cmd := &cobra.Command{
		Use:   "console NAME",
		Short: "Attach to the console of a sandbox",
		Long: `Attach to the console of a sandbox that runs, on drivers that have consoles: print
what it said last and what it says from now on, and type what is typed, until
Ctrl-] (--detach-keys) or until the sandbox ends. Detaching leaves the sandbox as
it is. If stdin is not a terminal, what it has is typed, and agentctl ends once
the console has been silent for a second after that.`,
		Example:           "  agentctl sandbox console web\n  agentctl sandbox console web </dev/null     # what it said last",
		Args:              exactly("NAME"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			sequence, err := parseKeys(keys)
			if err != nil {
				return usagef(cmd, "--detach-keys: %s", err)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			s := &console{a: a, c: c, name: args[0], keys: keys, filter: keyFilter{keys: sequence}}
			return s.run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&keys, "detach-keys", consoleKeys, "`keys` that detach; empty: none")
	return cmd
}

// console is one call of SandboxService.AttachConsole, tied to the streams of
// this process.
type console struct {
	a      *app
	c      *client
	name   string
	keys   string // that detach, as a person writes them
	filter keyFilter

	stream  agentv1.SandboxService_AttachConsoleClient
	leave   context.CancelCauseFunc
	raw     *rawMode // nil: stdin is no terminal
	typed   atomic.Bool
	silence *time.Timer // ends the call; runs once all was typed
}

// run attaches, and returns when the console has ended or was left.
func (s *console) run(ctx context.Context) error {
	inner, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	s.leave = leave
	if err := s.open(inner); err != nil {
		return s.c.link.explain(ctx, err)
	}
	s.silence = time.AfterFunc(consoleSilence, func() { leave(errDetached) })
	s.silence.Stop()
	release := func() {}
	if keyboard := terminalOf(s.a.stdin); keyboard != nil {
		if s.keys == "" {
			s.a.notef("attached to the console of %s", s.name)
		} else {
			s.a.notef("attached to the console of %s; %s detaches", s.name, s.keys)
		}
		var err error
		if s.raw, err = s.a.makeRaw(keyboard, ""); err != nil {
			return err
		}
		release = sync.OnceFunc(func() { s.raw.restore() })
		defer release()
	} else {
		s.filter.keys = nil
	}
	// Nobody waits for it: a read of stdin cannot be cut short.
	go s.copyInput()
	err := s.copyOutput()
	release()
	s.silence.Stop()
	switch {
	case errors.Is(context.Cause(inner), errDetached):
		if s.raw != nil {
			s.a.notef("detached; %s runs on", s.name)
		}
		return nil
	case errors.Is(err, io.EOF):
		s.a.notef("the console of %s has ended", s.name)
		return nil
	case lost(err):
		return &connectError{s.c.address, errors.New("the connection was lost while attached")}
	}
	return s.c.link.explain(ctx, err)
}

// open makes the call.
func (s *console) open(ctx context.Context) (err error) {
	if s.stream, err = s.c.sandboxes.AttachConsole(ctx); err != nil {
		return err
	}
	// An error of Send is io.EOF: what Recv returns says more.
	err = s.stream.Send(&agentv1.AttachConsoleRequest{Message: &agentv1.AttachConsoleRequest_Open{
		Open: &agentv1.ConsoleOpen{Name: s.name},
	}})
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	answer, err := s.stream.Recv()
	if err == nil && answer.GetOpened() == nil {
		err = errors.New("the agent did not say that the console is open")
	}
	return err
}

// copyInput types what stdin has, until its end or until the keys that detach.
func (s *console) copyInput() {
	defer s.raw.guard()
	chunk := make([]byte, inputChunk)
	for {
		n, readErr := s.a.stdin.Read(chunk)
		pass, detached := s.filter.feed(chunk[:n])
		if len(pass) > 0 {
			if s.stream.Send(&agentv1.AttachConsoleRequest{Message: &agentv1.AttachConsoleRequest_Data{Data: pass}}) != nil {
				return // Recv says why
			}
		}
		if detached {
			s.leave(errDetached)
			return
		}
		if readErr != nil {
			_ = s.stream.CloseSend()
			s.typed.Store(true)
			s.silence.Reset(consoleSilence)
			return
		}
	}
}

// copyOutput prints what the console says.
func (s *console) copyOutput() error {
	for {
		answer, err := s.stream.Recv()
		if err != nil {
			return err
		}
		if s.typed.Load() {
			s.silence.Reset(consoleSilence)
		}
		if _, err := s.a.stdout.Write(answer.GetData()); err != nil {
			return err
		}
	}
}
