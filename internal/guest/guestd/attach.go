//go:build linux

package guestd

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

// errDetached is an agent that has left, and meant to.
var errDetached = errors.New("detached")

// errGone is an agent that has closed its connection.
var errGone = errors.New("the agent is gone")

// exec answers an Exec. It returns once nobody is attached through conn.
func (e *execs) exec(_ context.Context, conn *wire.Conn, call *guestv1.Exec) error {
	x, err := e.launch(call)
	if err != nil {
		return err
	}
	if call.GetDetached() {
		x.mu.Lock()
		x.keep = true
		x.mu.Unlock()
		go x.follow() // ends with the command
		return conn.Send(x.startedResponse())
	}
	a := &attachment{conn: conn, ready: make(chan struct{})}
	close(a.ready)
	x.mu.Lock()
	x.attached = a
	x.mu.Unlock()
	// Should that fail, so does what follows.
	_ = conn.Send(x.startedResponse())
	go x.follow() // ends with the command, which may outlive the connection
	x.attend(a)
	return nil
}

func (x *execution) startedResponse() *guestv1.Response {
	return &guestv1.Response{Protocol: wire.Protocol, Result: &guestv1.Response_ExecStarted{
		ExecStarted: &guestv1.ExecStarted{Id: x.id, Pid: int32(x.pid)}, //nolint:gosec // The kernel's numbers have 22 bits.
	}}
}

// attach answers an Attach, as exec does.
func (e *execs) attach(_ context.Context, conn *wire.Conn, call *guestv1.Attach) error {
	x, err := e.find(call.GetId())
	if err != nil {
		return err
	}
	a := &attachment{conn: conn, ready: make(chan struct{})}
	x.mu.Lock()
	before := x.attached
	x.attached = a
	pieces := x.backlog.take()
	over, exit := x.retired, x.exit
	x.mu.Unlock()
	if before != nil {
		_ = before.conn.Close()
	}
	if call.GetSkipBacklog() {
		pieces = nil
	}
	sent := conn.Send(x.startedResponse())
	for _, piece := range pieces {
		if sent == nil {
			sent = conn.SendData(piece.kind, piece.data)
		}
	}
	close(a.ready)
	if over {
		if sent == nil && conn.Send(exit) == nil {
			e.forget(x)
		}
		x.leave(a)
		return nil
	}
	x.attend(a)
	return nil
}

// attend takes what the agent sends until it is gone, has been told the end and
// closed, has detached, or another took over.
func (x *execution) attend(a *attachment) {
	err := x.receive(a)
	if errors.Is(err, errDetached) {
		x.mu.Lock()
		x.keep = true
		x.mu.Unlock()
	}
	alone := x.leave(a)
	_ = a.conn.Close() // what is being sent to it ends
	x.mu.Lock()
	kill := alone && !x.keep && x.exit == nil
	x.mu.Unlock()
	if kill {
		x.hangUp()
	}
}

// receive takes frames until there are no more.
func (x *execution) receive(a *attachment) error {
	input := x.input
	begun := false // a line, in a terminal
	for {
		kind, payload, err := a.conn.Receive()
		switch {
		case err != nil:
			return err
		case kind == wire.KindStderr:
			return wire.ErrProtocol
		case kind == wire.KindEvent:
			if err := x.obey(payload); err != nil {
				return err
			}
		case input == nil:
		case len(payload) == 0:
			x.endInput(a, begun)
			input = nil
		default:
			begun = payload[len(payload)-1] != '\n' && payload[len(payload)-1] != '\r'
			if err := x.write(a, payload); err != nil {
				if errors.Is(err, errGone) {
					return err
				}
				input = nil // the command does not read any more
			}
		}
	}
}

// endInput closes the command's input. A terminal stays open, for it is the
// output, too: its reader sees the end of a line without a line.
func (x *execution) endInput(a *attachment, begun bool) {
	if !x.tty {
		x.input.Close()
		return
	}
	_ = x.write(a, endOfInput(x.input, begun))
}

// obey does what an ExecInput says.
func (x *execution) obey(payload []byte) error {
	var input guestv1.ExecInput
	if err := wire.Decode(payload, &input); err != nil {
		return err
	}
	switch said := input.GetInput().(type) {
	case *guestv1.ExecInput_Resize:
		if x.tty {
			_ = resize(x.output, said.Resize) // it may have ended
		}
	case *guestv1.ExecInput_Signal:
		_, _ = x.execs.signal(x, said.Signal)
	case *guestv1.ExecInput_Detach:
		if said.Detach {
			return errDetached
		}
	}
	return nil
}

// lookAround is how often to see whether the agent is still there while the
// command does not take its input.
const lookAround = 200 * time.Millisecond

// write gives input to the command, and waits while it does not take any. It
// returns errGone if the agent goes away meanwhile.
func (x *execution) write(a *attachment, data []byte) error {
	for len(data) > 0 {
		_ = x.input.SetWriteDeadline(time.Now().Add(lookAround))
		n, err := x.input.Write(data)
		data = data[n:]
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if gone(a.conn.NetConn()) {
				return errGone
			}
		case err != nil:
			return err
		}
	}
	return nil
}

// gone reports whether the peer has closed a connection of which not all has
// been read.
func gone(conn net.Conn) bool {
	with, ok := conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := with.SyscallConn()
	if err != nil {
		return true
	}
	hung := false
	err = raw.Control(func(fd uintptr) {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}} //nolint:gosec // A descriptor that is open.
		n, err := unix.Poll(poll, 0)
		hung = err == nil && n > 0 && poll[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
	})
	return err != nil || hung
}
