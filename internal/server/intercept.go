package server

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

// unary turns what a handler returns, or panics with, into a status, and
// refuses requests with fields of the future.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	begun, name := time.Now(), sandboxOf(req)
	answer, err := func() (answer any, err error) {
		defer recovered(&err)
		if msg, ok := req.(proto.Message); ok {
			if err := refuseUnknown(msg.ProtoReflect(), ""); err != nil {
				return nil, err
			}
		}
		return handler(ctx, req)
	}()
	if err = s.finish(ctx, info.FullMethod, name, begun, err); err != nil {
		return nil, err
	}
	return answer, nil
}

// stream is unary for streams. It also ends those that would go on for ever
// when the server stops; what is being sent in is waited for.
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, cancel := context.WithCancelCause(ss.Context())
	defer cancel(nil)
	if info.IsServerStream {
		stop := context.AfterFunc(s.serving, func() { cancel(errStopping) })
		defer stop()
	}
	watched := &watchedStream{ServerStream: ss, ctx: ctx}
	begun := time.Now()
	err := func() (err error) {
		defer recovered(&err)
		return handler(srv, watched)
	}()
	return s.finish(ctx, info.FullMethod, watched.sandbox, begun, err)
}

// watchedStream looks at the request of a server stream as it arrives.
type watchedStream struct {
	grpc.ServerStream
	ctx     context.Context
	sandbox string
}

func (w *watchedStream) Context() context.Context { return w.ctx }

func (w *watchedStream) RecvMsg(m any) error {
	if err := w.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	msg, ok := m.(proto.Message)
	if _, archive := m.(*agentv1.LoadImageRequest); !ok || archive {
		return nil // the header is looked at where it is read
	}
	// The first message says it; those after may be received by a goroutine that
	// the handler does not wait for.
	if name := sandboxOf(m); w.sandbox == "" && name != "" {
		w.sandbox = name
	}
	return refuseUnknown(msg.ProtoReflect(), "")
}

// sandboxOf is the name of the sandbox that a request concerns, or empty.
func sandboxOf(req any) string {
	if named, ok := req.(interface{ GetName() string }); ok {
		return named.GetName()
	}
	if holder, ok := req.(interface{ GetSandbox() *agentv1.Sandbox }); ok {
		return holder.GetSandbox().GetName()
	}
	switch first := req.(type) {
	case *agentv1.ExecRequest:
		return cmp.Or(first.GetStart().GetName(), first.GetAttach().GetName())
	case *agentv1.TunnelRequest:
		return first.GetOpen().GetName()
	case *agentv1.AttachConsoleRequest:
		return first.GetOpen().GetName()
	case *agentv1.WriteFileRequest:
		return first.GetHeader().GetName()
	case *agentv1.UploadArchiveRequest:
		return first.GetHeader().GetName()
	}
	return ""
}

// finish logs how a request ended and returns its status. Only what the agent
// is to blame for is an error of the log's.
func (s *Server) finish(ctx context.Context, method, name string, begun time.Time, err error) error {
	if err == nil && !s.log.Enabled(ctx, slog.LevelDebug) {
		return nil // what most requests come to
	}
	final := statusError(ctx, err, name)
	code := status.Code(final)
	if sandbox.ValidateName("name", name) != nil {
		name = ""
	}
	attrs := []slog.Attr{
		slog.String("method", method),
		slog.String("sandbox", name),
		slog.String("code", code.String()),
		slog.Duration("took", time.Since(begun)),
	}
	if err != nil {
		attrs = append(attrs, slog.String("err", err.Error()))
	}
	if panicked, ok := errors.AsType[*panicError](err); ok {
		attrs = append(attrs, slog.String("stack", string(panicked.stack)))
	}
	level := slog.LevelDebug
	if code == codes.Internal || code == codes.Unknown || code == codes.DataLoss {
		level = slog.LevelError
	}
	s.log.LogAttrs(context.WithoutCancel(ctx), level, "request", attrs...)
	return final
}
