//go:build unix

package wire

import (
	"errors"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// socket is a connected stream socket of whatever family, net's or not.
type socket struct {
	file *os.File
	raw  syscall.RawConn
}

// NewSocket is the connection of a stream socket that is connected, vsock's
// above all, which package net does not know. It takes the descriptor over, also
// on an error. It has CloseWrite and is a syscall.Conn; its addresses are of no
// interest.
func NewSocket(fd int) (net.Conn, error) {
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
	return &socket{file, raw}, nil
}

func (s *socket) Read(p []byte) (int, error) { return s.file.Read(p) }

func (s *socket) Write(p []byte) (int, error) { return s.file.Write(p) }

func (s *socket) Close() error {
	err := s.file.Close()
	if errors.Is(err, os.ErrClosed) {
		return net.ErrClosed
	}
	return err
}

// CloseWrite shuts the sending side down.
func (s *socket) CloseWrite() error {
	var failed error
	err := s.raw.Control(func(fd uintptr) { failed = unix.Shutdown(int(fd), unix.SHUT_WR) })
	return errors.Join(err, os.NewSyscallError("shutdown", failed))
}

// SyscallConn is for whoever splices.
func (s *socket) SyscallConn() (syscall.RawConn, error) { return s.raw, nil }

func (s *socket) LocalAddr() net.Addr { return socketAddr{} }

func (s *socket) RemoteAddr() net.Addr { return socketAddr{} }

func (s *socket) SetDeadline(t time.Time) error { return s.file.SetDeadline(t) }

func (s *socket) SetReadDeadline(t time.Time) error { return s.file.SetReadDeadline(t) }

func (s *socket) SetWriteDeadline(t time.Time) error { return s.file.SetWriteDeadline(t) }

// socketAddr is the address of a connection whose ends are of no interest.
type socketAddr struct{}

func (socketAddr) Network() string { return "vsock" }

func (socketAddr) String() string { return "vsock" }
