package servertest

import (
	"context"
	"errors"
	"io"
	"net"

	"google.golang.org/grpc"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

// Extended is a Driver that is a sandbox.Pauser and Console too, of an agent
// whose driver is.
type Extended struct{ *Driver }

var (
	_ sandbox.Pauser  = Extended{}
	_ sandbox.Console = Extended{}
)

// NewExtended is New, for a driver that pauses and has consoles.
func NewExtended(conn grpc.ClientConnInterface, name string) Extended {
	return Extended{New(conn, name)}
}

// Pause implements sandbox.Pauser.
func (d Extended) Pause(ctx context.Context, ref sandbox.Ref) error {
	_, err := d.sandboxes.PauseSandbox(ctx, &agentv1.PauseSandboxRequest{Name: ref.ID})
	return domainError(err)
}

// Resume implements sandbox.Pauser.
func (d Extended) Resume(ctx context.Context, ref sandbox.Ref) error {
	_, err := d.sandboxes.ResumeSandbox(ctx, &agentv1.ResumeSandboxRequest{Name: ref.ID})
	return domainError(err)
}

// Console implements sandbox.Console.
func (d Extended) Console(ctx context.Context, ref sandbox.Ref) (net.Conn, error) {
	// The call goes on when ctx, which is for opening it, has ended.
	inner, cancel := context.WithCancel(context.WithoutCancel(ctx))
	unbind := context.AfterFunc(ctx, cancel)
	stream, err := d.sandboxes.AttachConsole(inner)
	if err == nil {
		err = stream.Send(&agentv1.AttachConsoleRequest{Message: &agentv1.AttachConsoleRequest_Open{
			Open: &agentv1.ConsoleOpen{Name: ref.ID},
		}})
	}
	if err == nil || errors.Is(err, io.EOF) {
		_, err = stream.Recv() // says why, if Send does not
	}
	if !unbind() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		cancel()
		return nil, domainError(err)
	}
	// A pipe has the deadlines that a stream has not.
	ours, theirs := net.Pipe()
	go func() {
		defer cancel()
		typed := make([]byte, 4096)
		for {
			n, err := ours.Read(typed)
			if n > 0 {
				_ = stream.Send(&agentv1.AttachConsoleRequest{Message: &agentv1.AttachConsoleRequest_Data{Data: typed[:n]}})
			}
			if err != nil {
				return
			}
		}
	}()
	go func() {
		defer ours.Close()
		for {
			answer, err := stream.Recv()
			if err != nil {
				return
			}
			if _, err := ours.Write(answer.GetData()); err != nil {
				return
			}
		}
	}()
	return theirs, nil
}
