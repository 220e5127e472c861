package manager

import (
	"context"
	"net"
	"testing"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/guest/wire"
)

// stock is how many sockets are at hand for the present life of a sandbox.
func (h *host) stock(name string) (pool *spares, count int) {
	h.t.Helper()
	pool = h.entry(name).spares.Load()
	pool.mu.Lock()
	defer pool.mu.Unlock()
	return pool, len(pool.idle)
}

// awaitStock waits until there are some, and returns how many.
func (h *host) awaitStock(name string) (count int) {
	h.t.Helper()
	h.await(name, "with sockets at hand", func(*Sandbox) bool {
		_, count = h.stock(name)
		return count >= minSpares
	})
	return count
}

func TestLaterConnectionsUseSpareSockets(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := service(t)
	spec.Readiness.TCPPort = spec.Ports[0].GuestPort // none is refused then
	address := h.create("web", spec).Endpoints[0].Address.String()
	if _, n := h.stock("web"); n != 0 {
		t.Errorf("%d sockets are held for a sandbox that nobody has connected to", n)
	}
	greeted(t, address)
	before := h.awaitStock("web")
	pool, _ := h.stock("web")

	greeted(t, address)
	if _, n := h.stock("web"); n != before-1 {
		t.Errorf("%d sockets are left after a connection, want %d", n, before-1)
	}
	pool.drop(false)
	if _, n := h.stock("web"); n < before-1 {
		t.Errorf("%d are left of those that were used lately", n)
	}
	pool.drop(false)
	if _, n := h.stock("web"); n != 0 {
		t.Errorf("%d are left of those that nobody used", n)
	}
	greeted(t, address)
	h.awaitStock("web")

	if _, err := h.m.Stop(t.Context(), "web", time.Second); err != nil {
		t.Fatal(err)
	}
	h.await("web", "without sockets", func(*Sandbox) bool { _, n := h.stock("web"); return n == 0 })
	if pool.take() != nil {
		t.Error("a past life lends")
	}
	greeted(t, address)
	if now, _ := h.stock("web"); now == pool {
		t.Error("a new life has the sockets of the last")
	}
}

func TestServiceThatSpareSocketsDoNotReach(t *testing.T) {
	t.Parallel()
	if probe, err := net.Listen("tcp", "[::1]:0"); err != nil {
		t.Skip("this machine has no IPv6")
	} else {
		probe.Close()
	}
	h := newHost(t)
	address := h.create("web", serviceAt(t, "::1")).Endpoints[0].Address.String()
	greeted(t, address)
	h.awaitStock("web")
	greeted(t, address)
}

func TestNoSparesOfAGuestThatLendsNone(t *testing.T) {
	t.Parallel()
	asked := 0
	g := guest.New("web", func(context.Context) (net.Conn, error) {
		asked++
		here, there := net.Pipe()
		go func() {
			defer there.Close()
			conn := wire.New(there, wire.MaxFrame)
			if conn.ReceiveMessage(new(guestv1.Request)) == nil {
				_ = conn.Send(&guestv1.Response{Failure: &guestv1.Failure{Code: guestv1.Failure_CODE_UNIMPLEMENTED}})
			}
		}()
		return here, nil
	})
	s := newSpares(1)
	if s.take() != nil {
		t.Error("there is one before any was asked for")
	}
	s.keep(t.Context(), g) // returns: it is of no use to ask again
	if s.take() != nil || asked != 1 {
		t.Errorf("asked %d times", asked)
	}
}
