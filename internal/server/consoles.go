package server

import (
	"context"
	"errors"
	"io"
	"net"
	"syscall"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

func (s *sandboxService) AttachConsole(stream agentv1.SandboxService_AttachConsoleServer) error {
	first, err := stream.Recv()
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	open := first.GetOpen()
	if open == nil {
		return sandbox.Invalidf("open", "is missing: the first request is it")
	}
	if err := sandbox.ValidateName("name", open.GetName()); err != nil {
		return err
	}
	conn, generation, err := s.manager.Console(stream.Context(), open.GetName())
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := stream.Send(&agentv1.AttachConsoleResponse{Message: &agentv1.AttachConsoleResponse_Opened{
		Opened: &agentv1.ConsoleOpened{Generation: generation},
	}}); err != nil {
		return err
	}
	// It ends with the stream, which this method's return ends.
	go func() {
		if err := typeIn(stream, conn); err != nil {
			cancel(err)
		}
	}()
	err = chunks(conn, func(data []byte) error {
		return stream.Send(&agentv1.AttachConsoleResponse{Message: &agentv1.AttachConsoleResponse_Data{Data: data}})
	})
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if errors.Is(err, syscall.ECONNRESET) {
		return nil // it ended, and what was typed last was not read
	}
	return err
}

// typeIn types what the caller sends, until they send no more.
func typeIn(stream agentv1.SandboxService_AttachConsoleServer, conn net.Conn) error {
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil // what the console says is still wanted
		}
		if err == nil && req.GetOpen() != nil {
			err = sandbox.Invalidf("open", "came twice")
		}
		if err != nil {
			return err
		}
		if _, err := conn.Write(req.GetData()); err != nil {
			return nil //nolint:nilerr // It has ended, and reading says how.
		}
	}
}
