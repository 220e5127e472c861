package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/sandbox"
)

// MaxSockets is how many sockets a guest lends at once, at most.
const MaxSockets = wire.MaxDescriptors

// Socket is a TCP socket of a sandbox's own network that is not connected yet.
// It is connected from here, which saves asking the guest.
type Socket struct {
	guest *Guest
	fd    int
}

// LendSockets asks for count sockets, and may be given fewer. Where no
// descriptors pass, or guestd is too old, the error wraps
// sandbox.ErrUnsupported. The caller connects or closes them: each keeps the
// sandbox's network from going away.
func (g *Guest) LendSockets(ctx context.Context, count int) ([]*Socket, error) {
	const op = "borrow sockets of"
	caller := ctx
	ctx, cancel := context.WithTimeout(caller, answerLimit)
	defer cancel()
	conn, err := g.begin(ctx, op, &guestv1.Request{Call: &guestv1.Request_LendSockets{
		LendSockets: &guestv1.LendSockets{Count: uint32(count)}, //nolint:gosec // At most MaxSockets.
	}})
	if err != nil {
		return nil, g.late(caller, ctx, op, err)
	}
	defer conn.Close()
	defer conn.Bind(ctx)()
	if !wire.CanPassDescriptors(conn.NetConn()) {
		return nil, fmt.Errorf("%s %s: %w", op, g.name, sandbox.ErrUnsupported)
	}
	var response guestv1.Response
	fds, err := conn.ReceiveDescriptors(&response, count)
	if err != nil {
		return nil, g.broken(ctx, op, err)
	}
	var sockets []*Socket
	for _, fd := range fds {
		if s := (&Socket{g, fd}); fresh(fd) {
			sockets = append(sockets, s)
		} else {
			s.Close()
		}
	}
	switch failure := response.GetFailure(); {
	case failure != nil:
		closeSockets(sockets)
		return nil, g.failed(op, failure, response.GetProtocol())
	case len(sockets) == 0:
		return nil, g.odd(op, "it passed none")
	}
	return sockets, nil
}

func closeSockets(sockets []*Socket) {
	for _, s := range sockets {
		s.Close()
	}
}

// fresh reports whether a descriptor is a stream socket of IPv4 that is not
// connected and does not listen.
func fresh(fd int) bool {
	if kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || kind != unix.SOCK_STREAM {
		return false
	}
	if listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || listens != 0 {
		return false
	}
	address, err := unix.Getsockname(fd)
	if _, four := address.(*unix.SockaddrInet4); err != nil || !four {
		return false
	}
	_, err = unix.Getpeername(fd)
	return errors.Is(err, unix.ENOTCONN)
}

// Connect connects the socket to a port of the sandbox's 127.0.0.1, and uses it
// up. If nothing accepts there the error wraps sandbox.ErrRefused; it may be
// listened on at another address of the sandbox, which Guest.Connect would
// find.
func (s *Socket) Connect(ctx context.Context, port uint16) (net.Conn, error) {
	op := fmt.Sprintf("connect to port %d of", port)
	// Whoever lent it may have changed it since.
	if err := unix.SetNonblock(s.fd, true); err != nil {
		s.Close()
		return nil, s.guest.broken(ctx, op, err)
	}
	err := unix.Connect(s.fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(port)})
	file := os.NewFile(uintptr(s.fd), "lent")
	s.fd = -1
	defer file.Close()
	// Within one network it is done at once unless the service's backlog is full.
	if errors.Is(err, unix.EINPROGRESS) {
		err = connected(ctx, file)
	}
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return nil, fmt.Errorf("%s %s: %w", op, s.guest.name, &Error{Message: err.Error(), Sentinel: sandbox.ErrRefused})
	case err != nil:
		return nil, s.guest.broken(ctx, op, err)
	}
	return s.guest.adopt(op, file, false)
}

// connected waits until a connection that was begun is there, or has failed.
func connected(ctx context.Context, file *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = file.SetDeadline(time.Unix(1, 0)) })()
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var said error
	err = raw.Write(func(fd uintptr) bool { said = progress(int(fd)); return !errors.Is(said, unix.EINPROGRESS) })
	return errors.Join(err, said)
}

// progress is how far a connection is that was begun: nil once it is there.
func progress(fd int) error {
	failed, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	switch {
	case err != nil:
		return err
	case failed != 0:
		return syscall.Errno(failed)
	}
	if _, err := unix.Getpeername(fd); errors.Is(err, unix.ENOTCONN) {
		return unix.EINPROGRESS
	}
	return nil
}

// Close gives the socket back.
func (s *Socket) Close() {
	if s.fd >= 0 {
		_ = unix.Close(s.fd)
	}
	s.fd = -1
}
