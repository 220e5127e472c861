package manager

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/hostclock"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

// night is what the host sleeps for in tests.
var night = hostclock.Jump{Slept: 3*time.Hour + 12*time.Minute}

// journal is a log.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(p)
}

// said counts lines that have all of some words.
func (j *journal) said(words ...string) (count int) {
	j.mu.Lock()
	defer j.mu.Unlock()
lines:
	for line := range strings.Lines(j.text.String()) {
		for _, word := range words {
			if !strings.Contains(line, word) {
				continue lines
			}
		}
		count++
	}
	return count
}

// far is a driver whose guests are reached as those of machines are: by bytes
// that go over a channel of its own, which can be cut off with nobody told. It
// answers for them when their clocks are set.
type far struct {
	*process.Driver
	log  journal
	over chan struct{} // closed at the end of the test

	mu     sync.Mutex
	cut    chan struct{} // closed: what was dialed before carries no more
	lit    chan struct{} // closed: what is cut is gone for good
	clocks []time.Time   // that guests were told
}

func newFar(t *testing.T) (*host, *far) {
	d := &far{over: make(chan struct{}), cut: make(chan struct{}), lit: make(chan struct{})}
	t.Cleanup(func() { close(d.over) })
	h := newHost(t, func(c *Config) {
		d.Driver = process.New(process.Config{Root: t.TempDir(), Owner: "far"})
		c.Drivers = map[string]sandbox.Driver{process.Name: d}
		c.Log = slog.New(slog.NewTextHandler(io.MultiWriter(&d.log, t.Output()), nil))
	})
	h.m.farewell, h.m.wakeLimit = 2*time.Second, 3*time.Second
	return h, d
}

// cutOff has nothing that was dialed before carry on; dark: nor what is dialed
// from now on.
func (d *far) cutOff(dark bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.cut)
	if !dark {
		d.cut = make(chan struct{})
	}
}

// light has what is dialed from now on carry again, after all was dark.
func (d *far) light() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.lit)
	d.cut = make(chan struct{})
}

// told returns the times that guests' clocks were set to.
func (d *far) told() []time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]time.Time(nil), d.clocks...)
}

// channel is no *net.UnixConn: no descriptors pass.
type channel struct{ *net.UnixConn }

func (d *far) Dial(ctx context.Context, ref sandbox.Ref, port uint32) (net.Conn, error) {
	conn, err := d.Driver.Dial(ctx, ref, port)
	if err != nil {
		return nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	var ends [2]channel
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "channel")
		end, err := net.FileConn(file)
		file.Close()
		if err != nil {
			return nil, err
		}
		ends[i] = channel{end.(*net.UnixConn)}
	}
	d.mu.Lock()
	cut := d.cut
	d.mu.Unlock()
	go d.relay(cut, ends[1], channel{conn.(*net.UnixConn)})
	return ends[0], nil
}

func (d *far) relay(cut chan struct{}, here, there channel) {
	defer here.Close()
	defer there.Close()
	request := new(guestv1.Request)
	if wire.New(here, wire.MaxFrame).ReceiveMessage(request) != nil || d.isCut(cut) {
		return
	}
	if call := request.GetSetTime(); call != nil {
		d.mu.Lock()
		d.clocks = append(d.clocks, call.GetTime().AsTime())
		d.mu.Unlock()
		_ = wire.New(here, wire.MaxFrame).Send(&guestv1.Response{Protocol: wire.Protocol})
		return
	}
	if wire.New(there, wire.MaxFrame).Send(request) != nil {
		return
	}
	var both sync.WaitGroup
	carry := func(to, from channel) {
		buf := make([]byte, 1<<16)
		for {
			n, err := from.Read(buf)
			if d.isCut(cut) {
				return
			}
			if n > 0 {
				_, err = to.Write(buf[:n])
			}
			if err != nil {
				_ = to.CloseWrite()
				return
			}
		}
	}
	both.Go(func() { carry(there, here) })
	both.Go(func() { carry(here, there) })
	both.Wait()
}

// isCut returns false, or true at the end of the cut or of the test.
func (d *far) isCut(cut chan struct{}) bool {
	select {
	case <-cut:
		select {
		case <-d.over:
		case <-d.lit:
		}
		return true
	default:
		return false
	}
}

// open connects through the first port of a sandbox, and hears of the service.
func (h *host) open(s *Sandbox) net.Conn {
	h.t.Helper()
	conn, _ := greeted(h.t, s.Endpoints[0].Address.String())
	return conn
}

func TestVisitsThatAreLeftAreForgotten(t *testing.T) {
	t.Parallel()
	h, _ := newFar(t)
	e := h.entry(h.create("web", process.Spec("sleep")).Name)
	visit, err := h.m.Visit(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := visit.Guest.Hello(t.Context()); err != nil || len(e.calls()) != 1 {
		t.Errorf("a visit has %d calls, %v", len(e.calls()), err)
	}
	visit.Leave()
	if len(e.calls()) != 0 || len(e.visits) != 0 {
		t.Error("it was left, and is remembered")
	}
}

// runs has a caller run a command in a sandbox that goes on and says nothing.
func (h *host) runs(name string) *guest.Exec {
	h.t.Helper()
	visit, err := h.m.Visit(h.t.Context(), name)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(visit.Leave)
	command, err := visit.Guest.Exec(h.t.Context(), guest.Command{Args: []string{"sleep", "1h"}})
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { command.Close() })
	return command
}

// carries reports whether a connection to a service does, both ways.
func carries(conn net.Conn) error {
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, 1))
	return err
}

// ends returns how a connection ends on which nothing is sent.
func ends(conn net.Conn) error {
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, err := conn.Read(make([]byte, 1))
	return err
}

func TestWakingTellsGuestsTheTimeAndNobodyElse(t *testing.T) {
	t.Parallel()
	h, d := newFar(t)
	s := h.create("web", service(t))
	conn := h.open(s)
	paused := h.create("paused", process.Spec("sleep"))
	if _, err := h.m.Pause(t.Context(), paused.Name); err != nil {
		t.Fatal(err)
	}
	if _, err := h.m.Create(t.Context(), CreateRequest{Name: "stopped", Spec: process.Spec("sleep")}); err != nil {
		t.Fatal(err)
	}
	h.await("web", "greeted", func(s *Sandbox) bool { return s.GuestdVersion != "" })
	if told := d.told(); len(told) != 0 {
		t.Fatalf("before it slept: %v", told)
	}
	before := h.entry("web").snap.Load()
	h.m.rouse(night)
	told := d.told()
	if len(told) != 1 || time.Since(told[0]).Abs() > time.Minute {
		t.Errorf("guests were told it is %v", told)
	}
	if h.entry("web").snap.Load() != before {
		t.Error("nothing broke, and there is an event")
	}
	if err := carries(conn); err != nil {
		t.Errorf("the connection of before: %v", err)
	}
	if n := d.log.said("the host slept", "slept=3h12m0s", "clocks_set=1", "ports_listening=1", "guests_silent=0", "rebuilt=0"); n != 1 || d.log.said("slept") != 1 {
		t.Errorf("it was said %d times", n)
	}
	h.m.rouse(hostclock.Jump{Set: -time.Minute})
	if len(d.told()) != 2 || d.log.said("the clock of the host was set", "by=-1m0s", "clocks_set=1") != 1 {
		t.Errorf("a clock that was set: guests were told it is %v", d.told())
	}
	if _, err := h.m.Resume(t.Context(), "paused"); err != nil || len(d.told()) != 3 {
		t.Errorf("resumed: %v, %v", d.told(), err)
	}
}

func TestAgentThatWasNotThereTellsGuestsTheTime(t *testing.T) {
	t.Parallel()
	h, d := newFar(t)
	h.create("web", service(t))
	h.restart()
	h.await("web", "told the time", func(*Sandbox) bool { return len(d.told()) == 1 })
}

func TestContainersHaveTheirHostsClock(t *testing.T) {
	t.Parallel()
	var log journal
	h := newHost(t, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(io.MultiWriter(&log, t.Output()), nil)) })
	conn := h.open(h.create("web", service(t)))
	h.m.rouse(night)
	if err := carries(conn); err != nil {
		t.Error(err)
	}
	if log.said("the host slept", "clocks_set=0", "guests_silent=0", "connections_closed=0") != 1 || log.said("WARN") != 0 {
		t.Error("it says that something is wrong")
	}
}

// deafen replaces the listener at an address behind its back, as if the system
// had taken it: nobody is told.
func deafen(t *testing.T, at netip.AddrPort) {
	t.Helper()
	for fd := 3; fd < 4096; fd++ {
		name, err := unix.Getsockname(fd)
		four, ok := name.(*unix.SockaddrInet4)
		if err != nil || !ok || netip.AddrPortFrom(netip.AddrFrom4(four.Addr), uint16(four.Port)) != at {
			continue
		}
		if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || on == 0 {
			continue
		}
		other, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(other)
		if err := unix.Dup3(other, fd, unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("nothing listens at %s", at)
}

func TestWakingRebuildsAPortThatDied(t *testing.T) {
	t.Parallel()
	h, d := newFar(t)
	s := h.create("web", service(t))
	conn := h.open(s)
	deafen(t, s.Endpoints[0].Address)
	if _, err := net.DialTimeout("tcp", s.Endpoints[0].Address.String(), time.Second); err == nil {
		t.Fatal("it listens on")
	}
	h.m.rouse(night)
	if err := carries(conn); err != nil {
		t.Errorf("the connection of before: %v", err)
	}
	if err := carries(h.open(s)); err != nil { // at the same address
		t.Error(err)
	}
	if d.log.said("the host slept", "ports_listening=1", "ports_rebuilt=1", "ports_blocked=0") != 1 {
		t.Error("it does not say so")
	}

	deafen(t, s.Endpoints[0].Address)
	taken, err := net.Listen("tcp", s.Endpoints[0].Address.String())
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	h.m.rouse(night)
	ports, err := h.m.Ports(t.Context(), "web")
	if err != nil || len(ports) != 1 || !strings.Contains(ports[0].Problem, "in use by another program") {
		t.Errorf("a port that cannot be rebuilt: %+v, %v", ports, err)
	}
}

func TestWakingClosesConnectionsWhoseChannelDied(t *testing.T) {
	t.Parallel()
	h, d := newFar(t)
	spec := service(t)
	spec.AutoForward.Mode = sandbox.AutoForwardOffer
	s := h.create("web", spec)
	h.await("web", "watched", func(s *Sandbox) bool { return len(s.Detected) > 0 || s.GuestdVersion != "" })
	alive, dead := h.create("other", service(t)), h.open(s)
	other := h.open(alive)
	command := h.runs("web")
	d.cutOff(false)
	h.m.rouse(night)
	began := time.Now()
	if err := ends(dead); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection of before: %v, want a reset", err)
	}
	t.Logf("closed after %s", time.Since(began))
	if _, err := command.Receive(); !errors.Is(err, sandbox.ErrGuest) || !strings.Contains(err.Error(), "was cut off") {
		t.Errorf("the command of before: %v", err)
	}
	if err := carries(h.open(s)); err != nil {
		t.Errorf("a new one: %v", err)
	}
	// Nobody watches the ports of this one: it is not known to be dead.
	_ = other.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := other.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("another sandbox's: %v", err)
	}
	h.await("web", "free", func(*Sandbox) bool { return h.m.forward.OpenConnections("web") <= 1 })
	if s := h.get("web"); s.Phase != PhaseReady || s.Reason != "" {
		t.Errorf("%+v", s)
	}
	if d.log.said("the guest channel was cut off", "sandbox=web", "connections_closed=2") != 1 {
		t.Error("it does not say so")
	}
}

func TestWakingClosesConnectionsIntoAGuestThatStaysSilent(t *testing.T) {
	t.Parallel()
	h, d := newFar(t)
	s := h.create("web", service(t))
	conn := h.open(s)
	command := h.runs("web")
	d.cutOff(true)
	h.m.rouse(night)
	if _, err := command.Receive(); !errors.Is(err, sandbox.ErrGuest) || !strings.Contains(err.Error(), "was cut off") {
		t.Errorf("the command of before: %v", err)
	}
	if err := ends(conn); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection of before: %v, want a reset", err)
	}
	if d.log.said("the host slept", "guests_silent=1", "connections_closed=2", "clocks_set=0") != 1 {
		t.Error("it does not say so")
	}
	d.light()
	h.await("web", "told the time after all", func(*Sandbox) bool { return len(d.told()) == 1 })
	if err := carries(h.open(s)); err != nil {
		t.Errorf("a new connection: %v", err)
	}
}

func TestFarewellOfAGuestThatWasOnlySlowClosesNothing(t *testing.T) {
	t.Parallel()
	h, d := newFar(t)
	spec := service(t)
	spec.AutoForward.Mode = sandbox.AutoForwardOffer
	s := h.create("web", spec)
	h.await("web", "greeted", func(s *Sandbox) bool { return s.GuestdVersion != "" })
	conn := h.open(s)
	command := h.runs("web")
	for range 3 { // each time the connection of before is asked to end
		h.m.rouse(night)
	}
	if err := carries(conn); err != nil {
		t.Error(err)
	}
	if err := command.Signal(int32(unix.SIGTERM)); err != nil {
		t.Error(err)
	}
	if out, err := command.Receive(); err != nil || out.Exit == nil {
		t.Errorf("the command of before: %+v, %v", out, err)
	}
	if d.log.said("cut off") != 0 {
		t.Error("the channel was said to be cut off")
	}
}

func TestOperationUnderWayIsNoSilence(t *testing.T) {
	t.Parallel()
	h, d := newFar(t)
	spec := service(t)
	spec.AutoForward.Mode = sandbox.AutoForwardOffer
	s := h.create("web", spec)
	h.await("web", "greeted", func(s *Sandbox) bool { return s.GuestdVersion != "" })
	conn := h.open(s)
	e := h.entry("web")
	if err := e.lock(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.m.rouse(night)
	// Whoever keeps in touch with it waits for the lock, to take this back.
	h.m.see(e, func(s *Sandbox) { s.Reason = "GUEST_UNREACHABLE" })
	for range 2 {
		h.m.rouse(night)
	}
	e.unlock()
	if err := carries(conn); err != nil {
		t.Error(err)
	}
	if d.log.said("the host slept", "guests_silent=0", "connections_closed=0") != 3 || d.log.said("WARN") != 0 {
		t.Error("it says that something is wrong")
	}
	if d.log.said("the host slept", "clocks_set=1") == 0 {
		t.Error("that somebody has the lock keeps its clock from being set")
	}
	h.await("web", "told the time", func(s *Sandbox) bool {
		l := e.link.Load()
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.due == nil && s.Reason == ""
	})
}

func TestIdlenessIsMeasuredByTheClockThatSleeps(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("web", process.Spec("sleep"))
	e := h.entry("web")
	touch := func() {
		if _, err := h.m.Touch(t.Context(), "web"); err != nil {
			t.Fatal(err)
		}
	}
	for what, act := range map[string]func(){
		"its boot": func() {}, "a touch": touch, "a connection": func() { h.m.Active("web") }, "a stay": e.hold(),
	} {
		act()
		// See "Monotonic Clocks" in package time: it says so for such times.
		if at := e.lastActivity(); !strings.Contains(at.String(), " m=") {
			t.Errorf("%s is dated %s, by the wall clock alone", what, at)
		}
	}
}
