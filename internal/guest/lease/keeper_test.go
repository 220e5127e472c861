//go:build linux

package lease

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

var testMAC = net.HardwareAddr{0x5a, 0, 0, 0, 0, 1}

// server is a DHCP server, and the wire to it. What it does is set under its lock.
type server struct {
	mu      sync.Mutex
	silent  bool // to all
	refuses bool // answers requests with a NAK
	changes []dhcpv4.Modifier
	asked   []string // the kinds of message, and to whom they were sent
	open    int
}

func (s *server) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

// answer is what it says to a message; nil: nothing.
func (s *server) answer(t *testing.T, message []byte, to net.Addr) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := dhcpv4.FromBytes(message)
	if err != nil {
		t.Error(err)
		return nil
	}
	s.asked = append(s.asked, fmt.Sprintf("%s %s", m.MessageType(), to))
	kind := dhcpv4.MessageTypeOffer
	switch {
	case s.silent:
		return nil
	case m.MessageType() == dhcpv4.MessageTypeRequest && s.refuses:
		kind = dhcpv4.MessageTypeNak
	case m.MessageType() == dhcpv4.MessageTypeRequest:
		kind = dhcpv4.MessageTypeAck
	}
	answer := ackOf(t, append([]dhcpv4.Modifier{dhcpv4.WithReply(m), dhcpv4.WithMessageType(kind)}, s.changes...)...)
	return answer.ToBytes()
}

// wire is a connection to a server.
type wire struct {
	t       *testing.T
	server  *server
	answers chan []byte
	closed  chan struct{}
	once    sync.Once
}

func (s *server) dial(t *testing.T) func() (net.PacketConn, error) {
	return func() (net.PacketConn, error) {
		s.set(func() { s.open++ })
		return &wire{t: t, server: s, answers: make(chan []byte, 16), closed: make(chan struct{})}, nil
	}
}

func (w *wire) ReadFrom(p []byte) (int, net.Addr, error) {
	select {
	case answer := <-w.answers:
		return copy(p, answer), &net.UDPAddr{}, nil
	case <-w.closed:
		return 0, nil, net.ErrClosed
	}
}

func (w *wire) WriteTo(p []byte, to net.Addr) (int, error) {
	if answer := w.server.answer(w.t, p, to); answer != nil {
		w.answers <- []byte("no DHCP") // what is on a wire too
		w.answers <- answer
	}
	return len(p), nil
}

func (w *wire) Close() error {
	w.once.Do(func() {
		close(w.closed)
		w.server.set(func() { w.server.open-- })
	})
	return nil
}

func (w *wire) LocalAddr() net.Addr              { return &net.UDPAddr{} }
func (w *wire) SetDeadline(time.Time) error      { return nil }
func (w *wire) SetReadDeadline(time.Time) error  { return nil }
func (w *wire) SetWriteDeadline(time.Time) error { return nil }

// machine is what a keeper sets up.
type machine struct {
	server

	keeper  *Keeper
	applied []string // addresses; empty: taken back
	clock   time.Duration
}

// keep has a keeper run, within a bubble, until the test ends.
func keep(t *testing.T, m *machine) {
	t.Helper()
	m.keeper = New(Config{
		MAC: testMAC, Open: m.dial(t), Say: t.Logf,
		Apply: func(l *Lease) error {
			m.mu.Lock()
			defer m.mu.Unlock()
			if l == nil {
				l = &Lease{}
			}
			address := ""
			if l.Address.IsValid() {
				address = l.Address.String()
			}
			m.applied = append(m.applied, address)
			return nil
		},
		Now: func() time.Time {
			m.mu.Lock()
			defer m.mu.Unlock()
			return time.Now().Add(m.clock)
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.keeper.Keep(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		if m.open != 0 {
			t.Errorf("%d connections are left open", m.open)
		}
	})
}

// after lets time pass, and returns what was asked and set up in it.
func (m *machine) after(d time.Duration) (asked, applied []string) {
	time.Sleep(d)
	synctest.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	asked, applied, m.asked, m.applied = m.asked, m.applied, nil, nil
	return asked, applied
}

const (
	toAll    = " 255.255.255.255:67"
	toServer = " 192.168.64.1:67"
	mine     = "192.168.64.7/24"
)

func (m *machine) want(t *testing.T, what string, d time.Duration, asked, applied []string) {
	t.Helper()
	gotAsked, gotApplied := m.after(d)
	if !slices.Equal(gotAsked, asked) || !slices.Equal(gotApplied, applied) {
		t.Errorf("%s: it asked %q and set up %q, want %q and %q", what, gotAsked, gotApplied, asked, applied)
	}
}

func TestLeaseIsRenewedByTheServerInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var m machine
		keep(t, &m)
		m.want(t, "at first", time.Second, []string{"DISCOVER" + toAll, "REQUEST" + toAll}, []string{mine})
		m.want(t, "until T1", 30*time.Minute-2*time.Second, nil, nil)
		m.want(t, "at T1", 2*time.Second, []string{"REQUEST" + toServer}, []string{mine})
		m.want(t, "until the next T1", 29*time.Minute, nil, nil)
		m.want(t, "at the next", 2*time.Minute, []string{"REQUEST" + toServer}, []string{mine})
	})
}

func TestLeaseThatNobodyRenewsIsLostAndAskedForAnew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var m machine
		keep(t, &m)
		m.after(time.Second)
		m.set(func() { m.silent = true })
		asked, applied := m.after(52*time.Minute + 20*time.Second)
		if len(asked) < 4 || len(asked) > 20 || slices.Contains(asked, "REQUEST"+toAll) || len(applied) > 0 {
			t.Errorf("before T2 it asked %q, and set up %q", asked, applied)
		}
		asked, applied = m.after(7 * time.Minute)
		if len(asked) < 2 || len(asked) > 12 || asked[len(asked)-1] != "REQUEST"+toAll || len(applied) > 0 {
			t.Errorf("after T2 it asked %q, and set up %q", asked, applied)
		}
		asked, applied = m.after(time.Hour)
		if !slices.Equal(applied, []string{""}) || asked[len(asked)-1] != "DISCOVER"+toAll || len(asked) > 300 {
			t.Errorf("when it was over it asked %d times, and set up %q", len(asked), applied)
		}
		m.set(func() { m.silent = false })
		m.want(t, "once there is a server again", 2*time.Minute, []string{"DISCOVER" + toAll, "REQUEST" + toAll}, []string{mine})
	})
}

func TestLeaseThatIsTakenBackIsAskedForAnew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var m machine
		keep(t, &m)
		m.after(time.Second)
		m.set(func() { m.refuses = true })
		if asked, applied := m.after(30*time.Minute + 10*time.Second); !slices.Equal(applied, []string{""}) || asked[1] != "DISCOVER"+toAll {
			t.Errorf("it asked %q, and set up %q", asked, applied)
		}
		m.set(func() {
			m.refuses = false
			m.changes = []dhcpv4.Modifier{dhcpv4.WithYourIP(net.IPv4(192, 168, 64, 9))}
		})
		if _, applied := m.after(2 * time.Minute); !slices.Equal(applied, []string{"192.168.64.9/24"}) {
			t.Errorf("it set up %q", applied)
		}
	})
}

// A machine that stood still, as when it was paused, has a clock that did not
// go on, and one that was set.
func TestClockThatIsSetHasTheLeaseRenewedAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var m machine
		keep(t, &m)
		m.after(time.Second)
		m.set(func() { m.clock += time.Minute })
		m.want(t, "a minute on", lookEvery, []string{"REQUEST" + toServer}, []string{mine})
		m.want(t, "once only", 20*time.Minute, nil, nil)
		m.set(func() { m.clock -= time.Hour })
		m.want(t, "back", lookEvery, []string{"REQUEST" + toServer}, []string{mine})
		m.set(func() { m.clock += 3 * time.Second })
		m.want(t, "a little", time.Minute, nil, nil)
		m.set(func() { m.clock += 2 * time.Hour })
		m.want(t, "beyond its end", lookEvery, []string{"DISCOVER" + toAll, "REQUEST" + toAll}, []string{"", mine})
	})
}

func TestAnswerThatIsNotTakenLeavesThingsAsTheyAre(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := machine{server: server{changes: []dhcpv4.Modifier{dhcpv4.WithYourIP(net.IPv4(127, 0, 0, 1))}}}
		keep(t, &m)
		asked, applied := m.after(10 * time.Minute)
		if len(applied) > 0 || len(asked) < 4 || len(asked) > 60 {
			t.Errorf("it asked %d times, and set up %q", len(asked), applied)
		}
		m.set(func() { m.changes = nil })
		if _, applied := m.after(2 * time.Minute); !slices.Equal(applied, []string{mine}) {
			t.Errorf("it set up %q", applied)
		}
		m.set(func() { m.changes = []dhcpv4.Modifier{dhcpv4.WithLeaseTime(1)} })
		if _, applied := m.after(50 * time.Minute); len(applied) > 0 {
			t.Errorf("of a renewal it set up %q", applied)
		}
		m.set(func() { m.changes = nil })
		if asked, applied := m.after(8 * time.Minute); !slices.Equal(applied, []string{mine}) || slices.Contains(asked, "DISCOVER"+toAll) {
			t.Errorf("then it asked %q and set up %q", asked, applied)
		}
	})
}

func TestAskingEndsWithItsContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := machine{server: server{silent: true}}
		k := New(Config{MAC: testMAC, Open: m.dial(t), Say: t.Logf, Apply: func(*Lease) error { return nil }})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		began := time.Now()
		if err := k.Ask(ctx); err == nil || time.Since(began) != 10*time.Second || m.open != 0 {
			t.Errorf("after %s: %v, with %d connections left", time.Since(began), err, m.open)
		}
		m.set(func() { m.silent = false })
		if err := k.Ask(t.Context()); err != nil || k.held.Address != netip.MustParsePrefix(mine) {
			t.Errorf("then: %+v, %v", k.held, err)
		}
	})
}
