package forward

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// connection is one TCP connection of a client.
type connection struct {
	lease         *lease
	client, guest side
	// ended counts directions that have ended cleanly; delivered says that the
	// one to the client has.
	ended     atomic.Int32
	delivered atomic.Bool
	running   atomic.Int32
	once      sync.Once
}

// watchAfter is how long the sandbox may take for a connection before the
// client is watched: nearly all are there much sooner.
const watchAfter = 2 * time.Millisecond

// accept serves a listener until it is closed.
func (l *lease) accept(listener *net.TCPListener) error {
	pause := firstPause
	for {
		conn, err := listener.AcceptTCP()
		switch {
		case err == nil:
			pause = firstPause
			l.accepted(conn)
			continue
		case l.ctx.Err() != nil:
			return err
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOMEM):
			// Clients wait in the backlog until there is room again.
			l.warn(fmt.Errorf("accept: %w", err))
		case errors.Is(err, unix.EINVAL), errors.Is(err, net.ErrClosed):
			return err // it listens no more
		case !listens(listener):
			return err // nor does it whatever the error
		}
		select {
		case <-l.ctx.Done():
			return err
		case <-time.After(pause):
			pause = min(pause*2, acceptPause)
		}
	}
}

func (l *lease) accepted(conn *net.TCPConn) {
	c := &connection{lease: l, client: newSide(conn)}
	if err := l.enter(c); err != nil {
		c.client.reset()
		l.warn(err)
		return
	}
	l.carrying.Go(c.connect)
}

// connect leads the client into the sandbox, and starts to carry. It does not
// carry itself: the stack that connecting took would stay with it.
func (c *connection) connect() {
	l := c.lease
	l.f.cfg.Backend.Active(l.Sandbox)
	ctx, cancel := context.WithCancelCause(l.ctx)
	watched := make(chan struct{})
	watch := time.AfterFunc(watchAfter, func() {
		defer close(watched)
		if c.awaitLeave(ctx) {
			cancel(errLeft)
		}
	})
	conn, generation, err := l.f.cfg.Backend.Connect(ctx, l.Sandbox, l.GuestPort, false)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	cancel(nil)
	var unwoken error
	if !watch.Stop() {
		c.client.wake()
		<-watched
		unwoken = c.client.conn.SetReadDeadline(time.Time{})
	}
	if err == nil {
		c.guest = newSide(conn)
		err = unwoken
	}
	if err := l.connected(c, generation, err); err != nil {
		c.abort()
		l.leave(c)
		l.f.cfg.Backend.Active(l.Sandbox)
		if !errors.Is(err, errLeft) && l.ctx.Err() == nil {
			l.warn(err)
		}
		return
	}
	in := newPump(c.client, c.guest, l.f, &l.bytesIn)
	out := newPump(c.guest, c.client, l.f, &l.bytesOut)
	c.running.Store(2)
	l.carrying.Go(func() { c.direction(in) })
	l.carrying.Go(func() { c.direction(out) })
}

// direction carries one direction to its end and, if that was a clean one,
// watches for a reset until the other ends too.
func (c *connection) direction(p *pump) {
	err := p.run()
	if err == nil {
		if p.to == c.client {
			c.delivered.Store(true)
		}
		if c.ended.Add(1) == 2 {
			p.to.wake() // the other direction reads there
		} else {
			err = p.from.awaitBroken(&c.ended)
		}
	}
	if err != nil {
		c.abort()
	}
	if c.running.Add(-1) > 0 {
		return
	}
	c.once.Do(func() {
		c.client.conn.Close()
		c.guest.conn.Close()
	})
	c.lease.leave(c)
	c.lease.f.cfg.Backend.Active(c.lease.Sandbox)
}

// relayed implements carrier.
func (c *connection) relayed() bool { return c.guest.tcp == nil }

// abort ends it with a reset, but for what the sandbox has sent to its end:
// the kernel still delivers that.
func (c *connection) abort() {
	c.once.Do(func() {
		if c.delivered.Load() {
			c.client.conn.Close()
		} else {
			c.client.reset()
		}
		if c.guest.conn != nil {
			c.guest.reset()
		}
	})
}

// errLeft says that the client did not wait for the sandbox.
var errLeft = errors.New("the client left")

// awaitLeave waits until the client leaves, or ctx ends, or wake. It reads
// nothing of what the client has sent.
func (c *connection) awaitLeave(ctx context.Context) (left bool) {
	half := false
	err := c.client.raw.Read(func(fd uintptr) bool {
		events := pollFor(fd, pollLeft)
		left = c.client.brokenBy(events) != nil
		half = events&pollLeft != 0
		return left || half
	})
	if left || !half || err != nil {
		return left
	}
	client, here := plain(c.client.tcp.RemoteAddr().(*net.TCPAddr).AddrPort()), plain(c.client.tcp.LocalAddr().(*net.TCPAddr).AddrPort())
	for {
		left, known := clientLeft(client, here)
		if left || !known {
			return left && known
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(c.lease.f.patience):
		}
		if c.client.broken() != nil {
			return true
		}
	}
}

// warn logs at most once a minute for each lease, and else at debug level.
func (l *lease) warn(err error) {
	log := l.f.cfg.Log.With("sandbox", l.Sandbox, "port", l.HostPort, "protocol", l.Protocol(), "error", err)
	l.f.mu.Lock()
	quiet := time.Since(l.lastWarn) < time.Minute
	if !quiet {
		l.lastWarn = time.Now()
	}
	l.f.mu.Unlock()
	if quiet {
		log.Debug("a connection is not carried")
		return
	}
	log.Warn("a connection is not carried")
}
