//go:build linux

package qemu

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"syscall"
	"unsafe"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/qemu/vhost"
)

// cidSpacing is the distance between the addresses of guests of the kernel's
// vsock, where the host's ports are everybody's: for the port that the guest
// knows as N the host listens at N plus the guest's CID, of which the word
// tells the guest.
const (
	cidSpacing   = 1 << 12
	cidPortsWord = " choiros.hostports=cid"
)

// transport is how connections reach a guest, and come from it.
type transport interface {
	dial(ctx context.Context, port uint32) (net.Conn, error)
	listen(port uint32) (net.Listener, error)
}

// userVsock is package vhost's side of it.
type userVsock struct{ device *vhost.Device }

func (u userVsock) dial(ctx context.Context, port uint32) (net.Conn, error) {
	conn, err := u.device.Dial(ctx, port)
	if errors.Is(err, vhost.ErrNotStarted) || errors.Is(err, vhost.ErrRefused) {
		return nil, fmt.Errorf("%w: %w", vm.ErrNoListener, err)
	}
	if err != nil {
		return nil, err
	}
	return conn, nil
}

func (u userVsock) listen(port uint32) (net.Listener, error) { return u.device.Listen(port) }

// kernelGuest is the kernel's side of it. The device is QEMU's.
type kernelGuest struct{ cid uint32 }

// claimCID opens the kernel's device with an address that no other guest has.
func claimCID() (*os.File, uint32, error) {
	device, err := kernelVsock()
	if err != nil {
		return nil, 0, err
	}
	const setGuestCID = 0x4008af60 // VHOST_VSOCK_SET_GUEST_CID of linux/vhost.h
	for range 100 {
		cid := (1 + rand.Uint64N(1<<18)) * cidSpacing
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), setGuestCID, uintptr(unsafe.Pointer(&cid)))
		if errno == 0 {
			return device, uint32(cid), nil
		}
		if err = errno; errno != unix.EADDRINUSE {
			break
		}
	}
	device.Close()
	return nil, 0, os.NewSyscallError("ioctl VHOST_VSOCK_SET_GUEST_CID", err)
}

func (k kernelGuest) dial(ctx context.Context, port uint32) (net.Conn, error) {
	type result struct {
		conn *vsock.Conn
		err  error
	}
	dialled := make(chan result, 1)
	go func() {
		// The kernel gives up after two seconds.
		conn, err := vsock.Dial(k.cid, port, nil)
		dialled <- result{conn, err}
	}()
	select {
	case r := <-dialled:
		if errors.Is(r.err, syscall.ECONNRESET) || errors.Is(r.err, syscall.ECONNREFUSED) || errors.Is(r.err, syscall.ENODEV) {
			return nil, fmt.Errorf("%w: %w", vm.ErrNoListener, r.err)
		}
		if r.err != nil {
			return nil, r.err
		}
		return r.conn, nil
	case <-ctx.Done():
		go func() {
			if r := <-dialled; r.conn != nil {
				_ = r.conn.Close()
			}
		}()
		return nil, context.Cause(ctx)
	}
}

func (k kernelGuest) listen(port uint32) (net.Listener, error) {
	if port >= cidSpacing {
		return nil, fmt.Errorf("port %d is not below %d", port, cidSpacing)
	}
	listener, err := vsock.ListenContextID(vsock.Host, k.cid+port, nil)
	if err != nil {
		return nil, err
	}
	return ownListener{listener, k.cid}, nil
}

// ownListener takes connections from one guest alone.
type ownListener struct {
	*vsock.Listener
	cid uint32
}

func (l ownListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if peer, ok := conn.RemoteAddr().(*vsock.Addr); ok && peer.ContextID == l.cid {
			return conn, nil
		}
		conn.Close()
	}
}
