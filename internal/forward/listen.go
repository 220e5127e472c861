package forward

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Pauses between two attempts to bind, and to accept when that fails.
const (
	firstPause = 20 * time.Millisecond
	bindPause  = 5 * time.Second
	// acceptPause bounds how long a client waits once descriptors are free again.
	acceptPause = time.Second
)

// socket is what a lease listens on: *net.TCPListener or *net.UDPConn.
type socket interface {
	io.Closer
	syscall.Conn
}

// serve binds and serves until the lease or the Forwarder ends, and sends the
// outcome of its first attempt. Once it returns nothing of the lease is open.
func (l *lease) serve(at netip.AddrPort, kept socket, first chan<- error) {
	defer close(l.done)
	pause := firstPause
	for l.ctx.Err() == nil {
		s, err := kept, error(nil)
		if s == nil {
			s, err = l.bind(at)
		}
		kept = nil
		l.bound(err)
		l.attempted(s)
		if first != nil {
			first <- err
			first = nil
		}
		if err == nil {
			pause = firstPause
			l.serveOn(s)
		}
		select {
		case <-l.ctx.Done():
		case <-time.After(pause):
			pause = min(pause*2, bindPause)
		}
	}
	if kept != nil { // ended before it began
		l.end(kept)
	}
	if first != nil {
		first <- context.Cause(l.ctx)
	}
	for _, c := range l.open() {
		c.abort()
	}
	l.carrying.Wait()
}

// serveOn serves until the lease ends or the socket breaks, and closes it.
func (l *lease) serveOn(s socket) {
	ctx, cancel := context.WithCancel(l.ctx)
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		<-ctx.Done()
		l.end(s)
	}()
	defer func() {
		cancel()
		<-closed
	}()
	if keeper := l.f.cfg.Keeper; keeper != nil {
		if err := keeper.Keep(l.keepName(), s); err != nil {
			l.f.cfg.Log.Warn("a listening socket is not kept across restarts", "sandbox", l.Sandbox, "port", l.HostPort, "error", err)
		}
	}
	var err error
	switch s := s.(type) {
	case *net.TCPListener:
		err = l.accept(s)
	case *net.UDPConn:
		err = l.receive(s)
		l.endFlows()
	}
	if l.ctx.Err() == nil {
		// A copy that a Keeper has would be in the way of the next.
		shutdown(s)
		l.forget()
		l.bound(cmp.Or(l.broke(), err))
	}
}

// end closes the lease's socket. If the lease was released, no copy of the
// socket that a Keeper has, or a process that was just being started, may
// listen on: shutdown(2) ends that for all copies, on Linux.
func (l *lease) end(s socket) {
	if errors.Is(context.Cause(l.ctx), errReleased) {
		shutdown(s)
	}
	s.Close()
}

func shutdown(s socket) {
	raw, err := s.SyscallConn()
	if err != nil {
		return
	}
	// That a UDP socket is not connected is no hindrance and yet an error.
	_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
}

// open returns what the lease carries. What waits for the sandbox ends with
// the lease's context, and is not to be touched by another.
func (l *lease) open() []carrier {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	all := make([]carrier, 0, len(l.carriers))
	for c, boot := range l.carriers {
		if boot != 0 {
			all = append(all, c)
		}
	}
	return all
}

// bound records the outcome of an attempt to bind.
func (l *lease) bound(err error) {
	l.f.mu.Lock()
	was := l.bindError
	l.bindError = err
	if l.state != StateReleasing {
		l.state, l.detail = StateListening, ""
		if err != nil {
			l.state, l.detail = StateBlocked, err.Error()
		}
	}
	l.f.mu.Unlock()
	switch {
	case err != nil && was == nil:
		l.f.cfg.Log.Warn("a port is not reachable, trying on", "sandbox", l.Sandbox, "port", l.HostPort, "error", err)
	case err == nil && was != nil:
		l.f.cfg.Log.Info("a port is reachable again", "sandbox", l.Sandbox, "port", l.HostPort)
	}
}

// bind returns a new socket at the address and no other: 0.0.0.0 is not ::.
func (l *lease) bind(at netip.AddrPort) (socket, error) {
	if runtime.GOOS != "linux" {
		// There SO_REUSEADDR would let it overlay another program's listener.
		if err := probe(l.UDP, at); err != nil {
			return nil, l.bindFailed(err)
		}
	}
	var config net.ListenConfig
	if at.Addr().IsLoopback() {
		config.KeepAlive = -1 // of no use within one machine
	} else {
		// A client that is gone without a word, as after a sleep of either
		// machine's, is found within 90 s.
		config.KeepAliveConfig = net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 15 * time.Second, Count: 4}
	}
	family := "6"
	if at.Addr().Is4() {
		family = "4"
	}
	if l.UDP {
		conn, err := config.ListenPacket(l.ctx, "udp"+family, at.String())
		if err != nil {
			return nil, l.bindFailed(err)
		}
		return conn.(*net.UDPConn), nil
	}
	listener, err := config.Listen(l.ctx, "tcp"+family, at.String())
	if err != nil {
		return nil, l.bindFailed(err)
	}
	return listener.(*net.TCPListener), nil
}

func (l *lease) bindFailed(err error) error {
	if errors.Is(err, unix.EADDRINUSE) || errors.Is(err, errInUse) {
		return fmt.Errorf("port %d is %w", l.HostPort, errInUse)
	}
	return fmt.Errorf("port %d: %w", l.HostPort, err)
}
