package forward

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// TestNoClientEverReadsTheNameOfALaterOwner has few numbers and many sandboxes
// that come and go, each with a TCP and a UDP server that answers with its
// name, and clients that keep asking through whatever they have open.
func TestNoClientEverReadsTheNameOfALaterOwner(t *testing.T) {
	t.Parallel()
	first, _ := ranges()
	backend := &guests{addr: map[string]string{}, generation: map[string]uint64{}}
	f := open(t, Config{Backend: backend, First: first, Last: first + 2, ActivityInterval: time.Millisecond})
	rounds := 60
	if testing.Short() {
		rounds = 15
	}
	var asked, used atomic.Int64
	var all sync.WaitGroup
	for worker := range 4 {
		udp := worker%2 == 1
		all.Go(func() {
			for round := range rounds {
				name := fmt.Sprintf("w%d-%d", worker, round)
				live(t, f, backend, name, udp, &asked)
				used.Add(1)
			}
		})
	}
	all.Wait()
	if asked.Load() < used.Load() {
		t.Errorf("%d answers in %d lives", asked.Load(), used.Load())
	}
	if held := f.Leases(""); len(held) != 0 {
		t.Errorf("leases are left: %+v", held)
	}
}

// live is a sandbox's life, in which clients come that outlive it.
func live(t *testing.T, f *Forwarder, backend *guests, name string, udp bool, asked *atomic.Int64) {
	if udp {
		backend.set(name, udpServer(t, name))
	} else {
		backend.set(name, server(t, "tcp", func(conn net.Conn) {
			buf := make([]byte, 1)
			for {
				if _, err := conn.Read(buf); err != nil {
					return
				}
				if _, err := fmt.Fprintf(conn, "%-10s", name); err != nil {
					return
				}
			}
		}))
	}
	var leases []Lease
	for {
		var err error
		leases, err = f.Reserve([]Lease{{Sandbox: name, GuestPort: 80, UDP: udp}}, field)
		if err == nil {
			break
		}
		if !errors.Is(err, sandbox.ErrExhausted) {
			t.Error(err)
			return
		}
		time.Sleep(time.Millisecond)
	}
	l := leases[0]
	if err := f.Open(l); err != nil {
		t.Error(err)
		return
	}
	var clients sync.WaitGroup
	for range 4 {
		conn, err := net.Dial(l.Protocol(), l.dialAddress())
		if err != nil {
			t.Error(err)
			return
		}
		if udp {
			// Before the release: on a busy machine ask may begin long after it.
			_, _ = conn.Write([]byte("?"))
		}
		clients.Go(func() { ask(t, conn, name, asked) })
	}
	time.Sleep(time.Duration(rand.IntN(5)) * time.Millisecond) // somewhere in the middle of it all
	f.Release(l)
	// UDP clients cannot see that the port has changed hands: what they send
	// now is the next owner's. They stop here, with what is in flight.
	clients.Wait()
}

func (g *guests) set(name, addr string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.addr[name], g.generation[name] = addr, 1
}

// ask asks again and again, and returns once nobody answers.
func ask(t *testing.T, conn net.Conn, name string, asked *atomic.Int64) {
	defer conn.Close()
	buf := make([]byte, 256)
	_, isUDP := conn.(*net.UDPConn)
	for i := 0; ; i++ {
		if isUDP {
			// One datagram, sent already: the reply to it may be waited for long after.
			if i > 0 {
				_ = conn.SetReadDeadline(time.Now().Add(30 * time.Millisecond))
			}
		}
		if !isUDP {
			if _, err := conn.Write([]byte("?")); err != nil {
				return
			}
		}
		_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := conn.Read(buf)
		if err != nil {
			return
		}
		if got := strings.Fields(string(buf[:n]))[0]; !slices.Contains([]string{name}, got) {
			t.Errorf("a client of %s was answered by %s", name, got)
			return
		}
		asked.Add(1)
	}
}
