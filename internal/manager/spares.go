package manager

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
)

const (
	// maxSpares is how many sockets are kept for the next connections into a
	// sandbox, minSpares when more are asked for.
	maxSpares = 8
	minSpares = 4
	// spareFor is how long they are kept while nobody connects.
	spareFor = time.Minute
)

// spares are sockets of the network of one life of a sandbox. With one at hand
// a connection into the sandbox is a connect(2) of the agent's own, where
// otherwise guestd is asked to make it: half the time of a new connection.
//
// None is asked for before the first connection; nobody who forwards a port and
// never uses it pays for them.
type spares struct {
	generation uint64
	low        chan struct{} // more are to be had

	mu     sync.Mutex
	idle   []*guest.Socket
	used   bool // since they were last looked at
	closed bool
}

func newSpares(generation uint64) *spares {
	return &spares{generation: generation, low: make(chan struct{}, 1)}
}

// keep has sockets ready until ctx ends, which is to be no later than the life
// does: they keep its network alive.
func (s *spares) keep(ctx context.Context, g *guest.Guest) {
	defer s.drop(true)
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.low:
			// A guest that has none to give is asked again at the next connection.
			if err := s.refill(ctx, g); errors.Is(err, sandbox.ErrUnsupported) {
				return
			}
		case <-time.After(spareFor):
			s.drop(false)
		}
	}
}

func (s *spares) refill(ctx context.Context, g *guest.Guest) error {
	s.mu.Lock()
	missing := maxSpares - len(s.idle)
	s.mu.Unlock()
	lent, err := g.LendSockets(ctx, missing)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.idle = append(s.idle, lent...)
	return nil
}

// drop closes those that nobody has had a use for lately, or all for good.
func (s *spares) drop(all bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = s.closed || all
	if all || !s.used {
		for _, socket := range s.idle {
			socket.Close()
		}
		s.idle = nil
	}
	s.used = false
}

// take returns a socket, or nil.
func (s *spares) take() *guest.Socket {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.used = true
	var socket *guest.Socket
	if last := len(s.idle) - 1; last >= 0 {
		socket = s.idle[last]
		s.idle = s.idle[:last]
	}
	if len(s.idle) < minSpares {
		select {
		case s.low <- struct{}{}:
		default:
		}
	}
	return socket
}

// connectSpare connects to a port inside with a socket at hand. No connection
// and no error: there is none at hand, or nothing answers at 127.0.0.1.
func (e *entry) connectSpare(ctx context.Context, generation uint64, port uint16) net.Conn {
	s := e.spares.Load()
	if s == nil || s.generation != generation {
		return nil
	}
	socket := s.take()
	if socket == nil {
		return nil
	}
	conn, err := socket.Connect(ctx, port)
	if err != nil {
		return nil
	}
	return conn
}
