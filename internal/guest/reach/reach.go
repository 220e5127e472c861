//go:build linux

package reach

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

// bufferSize is that of the pool's buffers: any datagram and any answer of
// netlink fits into one.
const bufferSize = 64 << 10

// Service answers Connect, LendSockets, AwaitReady and WatchPorts. Its methods may run at
// the same time; each returns once its context ends.
type Service struct {
	run     func(ctx context.Context, command []string) (code int, err error)
	buffers sync.Pool
	// noDiag: the kernel has no sock_diag. It is asked once, because each
	// question would have it look for a module.
	noDiag atomic.Bool
}

// New returns a Service whose probes run commands with run, which gives the
// exit status and ends the command when its context ends.
func New(run func(ctx context.Context, command []string) (code int, err error)) *Service {
	return &Service{run: run, buffers: sync.Pool{New: func() any { return new([bufferSize]byte) }}}
}

func (s *Service) buffer() *[bufferSize]byte {
	buffer, ok := s.buffers.Get().(*[bufferSize]byte)
	if !ok {
		return new([bufferSize]byte)
	}
	return buffer
}

// Connect opens a connection inside: a descriptor, if that was asked for, or a
// relay over conn, which then is closed when the relay has ended. A relay may
// read all that the agent sends, so nobody else may read conn meanwhile; what
// happens to it is told by closing conn, and is no error.
func (s *Service) Connect(ctx context.Context, conn *wire.Conn, call *guestv1.Connect) error {
	if call.GetPassDescriptor() && !wire.CanPassDescriptors(conn.NetConn()) {
		return errNoDescriptors()
	}
	socket, err := s.dial(ctx, call.GetPort(), call.GetUdp())
	if err != nil {
		return err
	}
	defer socket.Close()
	response := &guestv1.Response{Protocol: wire.Protocol}
	if call.GetPassDescriptor() {
		return pass(conn, response, socket)
	}
	if err := conn.Send(response); err != nil {
		return err
	}
	end := context.AfterFunc(ctx, func() {
		socket.Close()
		_ = conn.Close()
	})
	defer end()
	switch socket := socket.(type) {
	case *net.TCPConn:
		s.relayStream(conn.NetConn(), socket)
	case *net.UDPConn:
		s.relayDatagrams(conn.NetConn(), socket)
	}
	_ = conn.Close()
	return nil
}

// LendSockets passes sockets from which the agent makes connections itself.
func (s *Service) LendSockets(_ context.Context, conn *wire.Conn, call *guestv1.LendSockets) error {
	if !wire.CanPassDescriptors(conn.NetConn()) {
		return errNoDescriptors()
	}
	if n := call.GetCount(); n == 0 || n > wire.MaxDescriptors {
		return failure(guestv1.Failure_CODE_INVALID, "count %d: not 1 to %d", n, wire.MaxDescriptors)
	}
	var fds []int
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	for range call.GetCount() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("socket: %w", err)
		}
		fds = append(fds, fd)
	}
	return conn.SendDescriptors(&guestv1.Response{Protocol: wire.Protocol}, fds...)
}

func errNoDescriptors() error {
	return failure(guestv1.Failure_CODE_UNIMPLEMENTED, "descriptors do not pass over this channel")
}

func pass(conn *wire.Conn, response *guestv1.Response, socket syscall.Conn) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	if err := raw.Control(func(fd uintptr) { sent = conn.SendDescriptors(response, int(fd)) }); err != nil { //nolint:gosec // A descriptor is an int.
		return err
	}
	return sent
}

func failure(code guestv1.Failure_Code, format string, a ...any) error {
	return &wire.FailureError{Failure: &guestv1.Failure{Code: code, Message: fmt.Sprintf(format, a...)}}
}
