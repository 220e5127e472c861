package forward

import (
	"context"
	"errors"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// errDeaf says that a socket is not what it was made.
var errDeaf = errors.New("its socket does not listen any more")

// Verified is what Verify found.
type Verified struct {
	Listening int // leases that clients can connect to, those rebuilt included
	Rebuilt   int // leases whose socket was dead, and was made anew
	Blocked   int // leases that cannot be bound; Leases says why
}

// Verify looks at the sockets of all leases that are open, as after a sleep of
// the host's. Nobody connects to them for that, which would wake sandboxes. One
// that listens no more, or at an address that the host has no more, is closed
// and bound anew at the same address; if that fails it is tried on as Open
// does. Connections that came in through it go on, UDP flows end. Verify
// returns once each was tried once, or ctx ends.
func (f *Forwarder) Verify(ctx context.Context) Verified {
	var v Verified
	var dead []*lease
	var tried []chan struct{}
	for _, l := range f.listening() {
		f.mu.Lock()
		s, next := l.socket, l.tried
		f.mu.Unlock()
		if s == nil {
			continue // it is being bound at this moment
		}
		err := l.check(s)
		if err == nil {
			continue
		}
		f.mu.Lock()
		if l.socket == s {
			l.fault = err
		}
		f.mu.Unlock()
		shutdown(s) // copies of it too
		s.Close()
		dead, tried = append(dead, l), append(tried, next)
	}
	for i, l := range dead {
		select {
		case <-tried[i]:
		case <-l.done:
		case <-ctx.Done():
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range dead {
		if l.state == StateListening {
			v.Rebuilt++
		}
	}
	for _, l := range f.leases {
		switch l.state {
		case StateListening:
			v.Listening++
		case StateBlocked:
			v.Blocked++
		case StateReserved, StateReleasing:
		}
	}
	return v
}

// listening returns the leases that are meant to listen, and do as far as is
// known.
func (f *Forwarder) listening() []*lease {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []*lease
	for _, l := range f.leases {
		if l.state == StateListening {
			all = append(all, l)
		}
	}
	return all
}

// attempted notes the outcome of an attempt to bind: s is nil if it failed.
func (l *lease) attempted(s socket) {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	l.socket, l.fault = s, nil
	close(l.tried)
	l.tried = make(chan struct{})
}

// broke notes that the socket is of no use any more, and returns what Verify
// found to be wrong with it.
func (l *lease) broke() error {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	fault := l.fault
	l.socket, l.fault = nil, nil
	return fault
}

// check returns nil if the kernel says of a socket that clients can reach it.
func (l *lease) check(s socket) error {
	at, err := l.address()
	if err != nil {
		return err
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	var bound netip.AddrPort
	var ready bool
	if err := raw.Control(func(fd uintptr) { ready = l.UDP || accepts(fd); bound = boundTo(fd) }); err != nil {
		return err
	}
	if !ready || bound != netip.AddrPortFrom(at.Addr().WithZone(""), at.Port()) {
		return errDeaf
	}
	if at.Addr().IsLoopback() || at.Addr().IsUnspecified() {
		return nil
	}
	// A socket stays bound to an address that has gone with its network.
	if err := bindOnce(true, netip.AddrPortFrom(at.Addr(), 0)); errors.Is(err, unix.EADDRNOTAVAIL) {
		return os.NewSyscallError("bind", err)
	}
	return nil
}

// listens reports whether a socket of TCP does.
func listens(s socket) bool {
	raw, err := s.SyscallConn()
	if err != nil {
		return false
	}
	var ready bool
	return raw.Control(func(fd uintptr) { ready = accepts(fd) }) == nil && ready
}

func accepts(fd uintptr) bool {
	listens, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	return err == nil && listens != 0
}

// boundTo is the address of a socket of IP, or nothing.
func boundTo(fd uintptr) netip.AddrPort {
	name, err := unix.Getsockname(int(fd))
	if err != nil {
		return netip.AddrPort{}
	}
	switch at := name.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(at.Addr), uint16(at.Port)) //nolint:gosec // It is a port.
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(at.Addr).Unmap(), uint16(at.Port)) //nolint:gosec // As above.
	}
	return netip.AddrPort{}
}

// Relayed are connections and flows of one sandbox that were open at some
// moment, and go over a channel and not by sockets of the sandbox's own.
type Relayed struct {
	f    *Forwarder
	open map[carrier]*lease
}

// Relayed returns those that are open now. What waits for the sandbox is none.
func (f *Forwarder) Relayed(sandbox string) Relayed {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := Relayed{f: f, open: map[carrier]*lease{}}
	for _, l := range f.leases {
		if l.Sandbox != sandbox {
			continue
		}
		for c, boot := range l.carriers {
			if boot != 0 && c.relayed() {
				r.open[c] = l
			}
		}
	}
	return r
}

// Reset closes, with a reset to both sides, those that are still open, each
// once, and returns how many that were. Unlike CutOff it keeps out none that comes later.
func (r Relayed) Reset() int {
	var left []carrier
	r.f.mu.Lock()
	for c, l := range r.open {
		if _, open := l.carriers[c]; open {
			left = append(left, c)
		}
	}
	clear(r.open) // which takes a moment to be over
	r.f.mu.Unlock()
	for _, c := range left {
		c.abort()
	}
	return len(left)
}
