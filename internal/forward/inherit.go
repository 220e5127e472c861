package forward

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Keeper keeps listening sockets open while the agent restarts: clients that
// connect meanwhile wait, and are served by the agent that comes. FDStore is
// one.
type Keeper interface {
	// Keep keeps a copy of a socket under a name. One of the same name that was
	// kept before is kept too, unless it is the same.
	Keep(name string, socket syscall.Conn) error
	// Forget closes what was kept under a name, and returns once it is closed.
	Forget(name string) error
}

// KeepPrefix begins the names that sockets are kept under.
const KeepPrefix = "forward-"

// keepName is such as forward-tcp-127.0.0.1-12000, of characters that
// FDNAME= in sd_pid_notify_with_fds(3) allows.
func (l Lease) keepName() string {
	at, err := l.address()
	if err != nil {
		return ""
	}
	return KeepPrefix + l.Protocol() + "-" + strings.ReplaceAll(at.Addr().String(), ":", "_") + fmt.Sprint("-", l.HostPort)
}

// inherited is a socket that was kept, and has not been claimed by a lease.
type inherited struct {
	name string
	udp  bool
	at   netip.AddrPort
	socket
}

// inherit takes over what was kept. What is not a listening socket is closed
// and forgotten.
func (f *Forwarder) inherit(files []*os.File) {
	for _, file := range files {
		name := file.Name()
		if !strings.HasPrefix(name, KeepPrefix) {
			continue
		}
		kept, err := inheritSocket(file)
		file.Close()
		if err != nil {
			f.cfg.Log.Warn("what was kept under this name is no listening socket", "name", name, "error", err)
			f.forgetName(name)
			continue
		}
		kept.name = name
		f.inherited = append(f.inherited, kept)
	}
}

// inheritSocket makes a socket of a descriptor, and believes only what the
// kernel says of it. It does not close file.
func inheritSocket(file *os.File) (*inherited, error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	var kind, accepts int
	var kindErr, acceptErr error
	if err := raw.Control(func(fd uintptr) {
		kind, kindErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE)
		accepts, acceptErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	}); err != nil {
		return nil, err
	}
	switch {
	case kindErr != nil:
		return nil, os.NewSyscallError("getsockopt SO_TYPE", kindErr)
	case kind == unix.SOCK_STREAM && (acceptErr != nil || accepts == 0):
		return nil, errors.New("it does not listen")
	case kind == unix.SOCK_STREAM:
		listener, err := net.FileListener(file)
		if err != nil {
			return nil, err
		}
		if l, ok := listener.(*net.TCPListener); ok {
			return &inherited{at: plain(l.Addr().(*net.TCPAddr).AddrPort()), socket: l}, nil
		}
		return nil, errors.Join(errors.New("it is not of TCP"), listener.Close())
	case kind == unix.SOCK_DGRAM:
		conn, err := net.FilePacketConn(file)
		if err != nil {
			return nil, err
		}
		if c, ok := conn.(*net.UDPConn); ok && c.RemoteAddr() == nil {
			return &inherited{udp: true, at: plain(c.LocalAddr().(*net.UDPAddr).AddrPort()), socket: c}, nil
		}
		return nil, errors.Join(errors.New("it is not of UDP, or connected"), conn.Close())
	}
	return nil, fmt.Errorf("it is a socket of type %d", kind)
}

func plain(at netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// takeInherited returns the kept socket of that address, or nil. f.mu is held.
func (f *Forwarder) takeInherited(udp bool, at netip.AddrPort) socket {
	for i, kept := range f.inherited {
		if kept.udp == udp && kept.at == at {
			f.inherited = append(f.inherited[:i:i], f.inherited[i+1:]...)
			return kept.socket
		}
	}
	return nil
}

// DropUnclaimed closes and forgets what was kept for leases that are no more.
// It is called once all recorded leases were opened: until then their ports
// cannot be reserved.
func (f *Forwarder) DropUnclaimed() {
	f.mu.Lock()
	unclaimed := f.inherited
	f.inherited = nil
	claimed := map[string]bool{}
	for _, l := range f.leases {
		claimed[l.keepName()] = true
	}
	f.mu.Unlock()
	for _, kept := range unclaimed {
		shutdown(kept)
		kept.Close()
		if !claimed[kept.name] {
			f.forgetName(kept.name)
		}
	}
}

func (l *lease) forget() { l.f.forgetName(l.keepName()) }

func (f *Forwarder) forgetName(name string) {
	if f.cfg.Keeper == nil {
		return
	}
	if err := f.cfg.Keeper.Forget(name); err != nil {
		f.cfg.Log.Warn("a kept socket may still be open", "name", name, "error", err)
	}
}
