//go:build linux

package qemu

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/vm"
)

// The names of vhost-device-vsock's sockets: QEMU's, ours, and, with _PORT
// behind it, where it brings what the guest connects to.
const (
	vhostSocket = "vhost"
	vsockSocket = "vsock"
)

// creditWord tells the guest that its vsock device forgets to give credit, and
// that connections are wrapped: wire.WithCredit.
const creditWord = " choiros.credit=1"

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

// userVsock is vhost-device-vsock's side of it: unix sockets.
type userVsock struct{ dir folder }

var errNoDriver = errors.New("the guest has not set its vsock device up")

// settling is how long vhost-device-vsock is given for the messages that QEMU
// sends it as the guest sets the device up, once they are on their way.
const settling = 20 * time.Millisecond

// vsockStarted is an error while the guest has not set the device up.
// vhost-device-vsock does not survive a connection in the middle of that: a
// thread of it ends, and it is silent from then on.
func (m *machine) vsockStarted(ctx context.Context) error {
	m.mu.Lock()
	plugged, inUse := m.plugged, m.inUse
	m.mu.Unlock()
	if m.plan.vsock != vsockUser || inUse {
		return nil
	}
	if !plugged {
		return errNoDriver
	}
	var status struct {
		Started bool `json:"vhost-started"`
	}
	err := m.mon.run(ctx, "x-query-virtio-status", object{"path": "/machine/peripheral/" + vsockDevice + "/virtio-backend"}, &status)
	if refusal, ok := errors.AsType[*commandError](err); ok && refusal.Class == "CommandNotFound" {
		status.Started = true // QEMU before 7.2 cannot tell
	} else if err != nil {
		return err
	}
	if !status.Started {
		return errNoDriver
	}
	select {
	case <-time.After(settling):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.inUse = m.plugged
	return nil
}

func (u userVsock) dial(ctx context.Context, port uint32) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", u.dir.name(vsockSocket))
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("%w: %w", vm.ErrNoListener, err)
	}
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	err = askFor(conn, port)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return wire.WithCredit(conn), nil
}

// askFor asks for a port, in the manner of Firecracker: "CONNECT 1024\n" is
// answered with "OK 1073741824\n", or by the connection's end.
func askFor(conn net.Conn, port uint32) error {
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		return fmt.Errorf("%w: %w", vm.ErrNoListener, err)
	}
	// What comes behind the line is the guest's already.
	var said [32]byte
	for n := range said {
		if _, err := conn.Read(said[n : n+1]); err != nil {
			return fmt.Errorf("%w: %w", vm.ErrNoListener, err)
		}
		if said[n] == '\n' {
			if line := string(said[:n]); !strings.HasPrefix(line, "OK ") {
				return fmt.Errorf("vhost-device-vsock said %q", line)
			}
			return nil
		}
	}
	return fmt.Errorf("vhost-device-vsock said %q", said)
}

func (u userVsock) listen(port uint32) (net.Listener, error) {
	name := u.dir.name(vsockSocket + "_" + strconv.FormatUint(uint64(port), 10))
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		return nil, err
	}
	return creditListener{listener}, nil
}

type creditListener struct{ *net.UnixListener }

func (l creditListener) Accept() (net.Conn, error) {
	conn, err := l.UnixListener.Accept()
	if err != nil {
		return nil, err
	}
	return wire.WithCredit(conn), nil
}

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
