package vm

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// socketConn is a connected stream socket of whatever family, net's or not: a
// vsock connection that another process has made.
type socketConn struct {
	file *os.File
	raw  syscall.RawConn
}

// newSocketConn takes a descriptor over.
func newSocketConn(fd int) (net.Conn, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	file := os.NewFile(uintptr(fd), "vsock")
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, err
	}
	return &socketConn{file, raw}, nil
}

func (c *socketConn) Read(p []byte) (int, error) { return c.file.Read(p) }

func (c *socketConn) Write(p []byte) (int, error) { return c.file.Write(p) }

func (c *socketConn) Close() error {
	err := c.file.Close()
	if errors.Is(err, os.ErrClosed) {
		return net.ErrClosed
	}
	return err
}

// CloseWrite shuts the sending side down.
func (c *socketConn) CloseWrite() error {
	var failed error
	err := c.raw.Control(func(fd uintptr) { failed = unix.Shutdown(int(fd), unix.SHUT_WR) })
	return errors.Join(err, os.NewSyscallError("shutdown", failed))
}

// SyscallConn is for whoever splices.
func (c *socketConn) SyscallConn() (syscall.RawConn, error) { return c.raw, nil }

func (c *socketConn) LocalAddr() net.Addr { return vsockAddr{} }

func (c *socketConn) RemoteAddr() net.Addr { return vsockAddr{} }

func (c *socketConn) SetDeadline(t time.Time) error { return c.file.SetDeadline(t) }

func (c *socketConn) SetReadDeadline(t time.Time) error { return c.file.SetReadDeadline(t) }

func (c *socketConn) SetWriteDeadline(t time.Time) error { return c.file.SetWriteDeadline(t) }

// vsockAddr is the address of a connection whose ends are of no interest.
type vsockAddr struct{}

func (vsockAddr) Network() string { return "vsock" }

func (vsockAddr) String() string { return "vsock" }

// closeWriter is a connection of which one direction can end before the other.
type closeWriter interface {
	net.Conn
	CloseWrite() error
}

// relay carries bytes between two connections until both directions have
// ended, or one has failed, and closes both. An end is passed on.
func relay(a, b net.Conn) {
	defer a.Close()
	defer b.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		carry(a, b)
	}()
	carry(b, a)
	<-done
}

func carry(to, from net.Conn) {
	_, err := io.Copy(to, from)
	w, ok := to.(closeWriter)
	if err != nil || !ok || w.CloseWrite() != nil {
		// Nothing more will come of it: the other direction is to end, too.
		to.Close()
		from.Close()
	}
}
