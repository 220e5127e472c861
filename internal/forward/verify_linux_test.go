package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// deafen replaces the socket of a lease by another behind its back, as if the
// system had taken it: nobody is told.
func deafen(t *testing.T, f *Forwarder, l Lease) {
	t.Helper()
	f.mu.Lock()
	s := f.leases[key{l.UDP, l.HostPort}].socket
	f.mu.Unlock()
	raw, err := s.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	other, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other)
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = unix.Dup3(other, int(fd), unix.O_CLOEXEC) }); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
}

// only returns the status of the one lease.
func only(t *testing.T, f *Forwarder) Status {
	t.Helper()
	all := f.Leases("")
	if len(all) != 1 {
		t.Fatalf("leases: %+v", all)
	}
	return all[0]
}

func TestVerifyLeavesWhatListensAlone(t *testing.T) {
	t.Parallel()
	backend := leadTo(server(t, "tcp", echo))
	f := open(t, Config{Backend: backend})
	for _, bind := range []string{"", "0.0.0.0", "::1", "::"} {
		if _, err := net.ListenPacket("udp", net.JoinHostPort(bind, "0")); err != nil {
			continue // a machine without IPv6
		}
		forwarded(t, f, Lease{BindAddress: bind})
		forwarded(t, f, Lease{BindAddress: bind, UDP: true})
	}
	count := len(f.Leases(""))
	if v := f.Verify(t.Context()); v != (Verified{Listening: count}) {
		t.Errorf("%+v, of %d", v, count)
	}
	if tcp, udp := f.Totals(); tcp.Accepted != 0 || udp.Accepted != 0 || backend.active != nil {
		t.Error("to verify counts as a client")
	}
}

func TestVerifyRebuildsWhatListensNoMore(t *testing.T) {
	t.Parallel()
	f := open(t, Config{Backend: leadTo(server(t, "tcp", echo))})
	l := forwarded(t, f, Lease{})
	before := dial(t, l)
	exchange(t, before, "before")
	deafen(t, f, l)
	if conn, err := net.DialTimeout("tcp", l.dialAddress(), time.Second); err == nil {
		conn.Close()
		t.Fatal("it listens on")
	}
	if v := f.Verify(t.Context()); v != (Verified{Listening: 1, Rebuilt: 1}) {
		t.Errorf("%+v", v)
	}
	exchange(t, dial(t, l), "after")
	exchange(t, before, "still") // by the connection of before
	if s := only(t, f); s.State != StateListening || s.Detail != "" {
		t.Errorf("%+v", s)
	}
	if v := f.Verify(t.Context()); v != (Verified{Listening: 1}) {
		t.Errorf("again: %+v", v)
	}
}

func TestVerifyRebuildsUDPAndItsFlows(t *testing.T) {
	t.Parallel()
	f := open(t, Config{Backend: leadTo(udpServer(t, "web"))})
	l := forwarded(t, f, Lease{UDP: true})
	client := dialUDP(t, l)
	before := exchange(t, client, "x")
	deafen(t, f, l)
	if v := f.Verify(t.Context()); v != (Verified{Listening: 1, Rebuilt: 1}) {
		t.Errorf("%+v", v)
	}
	eventually(t, "the flow of before has ended", func() bool { return only(t, f).Open == 0 })
	if after := exchange(t, client, "x"); !strings.HasPrefix(after, "web ") || after == before {
		t.Errorf("%q, and before %q: want another flow", after, before)
	}
}

func TestVerifySaysWhyAPortCannotBeRebuilt(t *testing.T) {
	t.Parallel()
	f := open(t, Config{Backend: leadTo(server(t, "tcp", echo))})
	l := forwarded(t, f, Lease{})
	deafen(t, f, l)
	taken := stranger(t, "tcp", l.dialAddress())
	if v := f.Verify(t.Context()); v != (Verified{Blocked: 1}) {
		t.Errorf("%+v", v)
	}
	if s := only(t, f); s.State != StateBlocked || !strings.Contains(s.Detail, "in use by another program") {
		t.Errorf("%+v", s)
	}
	taken.Close()
	eventually(t, "it listens again", func() bool { return only(t, f).State == StateListening })
	exchange(t, dial(t, l), "after")
}

// TestWhatIsRebuiltIsKeptInPlaceOfWhatDied: the copy that a service manager has
// of a socket that died here still listens, and nobody accepts.
func TestWhatIsRebuiltIsKeptInPlaceOfWhatDied(t *testing.T) {
	t.Parallel()
	m := startManager(t, false)
	first, last := ranges()
	config := Config{Backend: leadTo(server(t, "tcp", echo)), First: first, Last: last, Keeper: FDStore{Socket: m.path}}
	f := New(config)
	l := forwarded(t, f, Lease{})
	kept := fmt.Sprintf("forward-tcp-127.0.0.1-%d 1", l.HostPort)
	eventually(t, "it is kept", func() bool { return m.names() == kept })
	deafen(t, f, l)
	if v := f.Verify(t.Context()); v != (Verified{Listening: 1, Rebuilt: 1}) {
		t.Errorf("%+v", v)
	}
	exchange(t, dial(t, l), "after")
	eventually(t, "the new one is kept", func() bool { return m.names() == kept })
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	config.Inherited = m.files(t)
	f = open(t, config)
	if err := f.Open(l); err != nil {
		t.Fatal(err)
	}
	exchange(t, dial(t, l), "by the next agent")
}

// TestVerifySeesThatAnAddressIsGone has a socket that is bound to an address
// that the host has not, as one is after a laptop has moved to another network.
func TestVerifySeesThatAnAddressIsGone(t *testing.T) {
	t.Parallel()
	first, last := ranges()
	at := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.77"), first)
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1) })
	}}
	listener, err := config.Listen(t.Context(), "tcp4", at.String())
	if err != nil {
		t.Fatal(err)
	}
	l := Lease{Sandbox: "web", GuestPort: 80, HostPort: first, BindAddress: at.Addr().String()}
	file, err := listener.(*net.TCPListener).File()
	listener.Close()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	f := open(t, Config{
		Backend: leadTo(server(t, "tcp", echo)), First: first, Last: last,
		Inherited: []*os.File{os.NewFile(uintptr(fd), l.keepName())},
	})
	if err := f.Open(l); err != nil {
		t.Fatal(err)
	}
	if v := f.Verify(t.Context()); v != (Verified{Blocked: 1}) {
		t.Errorf("%+v", v)
	}
	if s := only(t, f); s.State != StateBlocked || !strings.Contains(s.Detail, "cannot assign requested address") {
		t.Errorf("%+v", s)
	}
}

func TestVerifyReturnsWithItsContext(t *testing.T) {
	t.Parallel()
	f := open(t, Config{Backend: leadTo(server(t, "tcp", echo))})
	l := forwarded(t, f, Lease{})
	deafen(t, f, l)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f.Verify(ctx)
	eventually(t, "it is rebuilt all the same", func() bool { return only(t, f).State == StateListening && f.Verify(t.Context()).Rebuilt == 0 })
	exchange(t, dial(t, l), "after")
}

func TestRelayedAreResetAndNoOthers(t *testing.T) {
	t.Parallel()
	relayed, own := server(t, "unix", echo), server(t, "tcp", echo)
	var over atomic.Pointer[string]
	backend := leadTo("")
	backend.connect = func(ctx context.Context, _ string, _ uint16, _ bool) (net.Conn, uint64, error) {
		network, addr := "tcp", own
		if over.Load() != nil {
			network, addr = "unix", *over.Load()
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		return conn, 7, err
	}
	f := open(t, Config{Backend: backend})
	l := forwarded(t, f, Lease{})
	other := forwarded(t, f, Lease{Sandbox: "other"})
	open := func(l Lease) net.Conn {
		conn := dial(t, l)
		exchange(t, conn, "x")
		return conn
	}
	passed := open(l)
	over.Store(&relayed)
	ended, dead, others := open(l), open(l), open(other)
	before := f.Relayed("web")
	later := open(l)
	ended.Close()
	eventually(t, "it has ended", func() bool { return f.OpenConnections("web") == 3 })
	if n := before.Reset(); n != 1 {
		t.Errorf("%d were closed, want 1", n)
	}
	if n := before.Reset(); n != 0 {
		t.Errorf("%d were closed again", n)
	}
	if _, err := dead.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("what was open then: %v, want a reset", err)
	}
	for what, conn := range map[string]net.Conn{
		"a socket of the sandbox's own": passed, "what came later": later, "another sandbox's": others, "the next": dial(t, l),
	} {
		if _, err := io.WriteString(conn, "y"); err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestClientsOfOtherMachinesAreProbed(t *testing.T) {
	t.Parallel()
	f := open(t, Config{Backend: leadTo(server(t, "tcp", echo))})
	l := forwarded(t, f, Lease{BindAddress: "0.0.0.0"})
	exchange(t, dial(t, l), "x")
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.leases[key{false, l.HostPort}].carriers {
		err := c.(*connection).client.raw.Control(func(fd uintptr) {
			for option, want := range map[int]int{unix.TCP_KEEPIDLE: 30, unix.TCP_KEEPINTVL: 15, unix.TCP_KEEPCNT: 4} {
				if got, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, option); got != want || err != nil {
					t.Errorf("TCP option %d is %d, want %d: %v", option, got, want, err)
				}
			}
			if on, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE); on == 0 || err != nil {
				t.Errorf("SO_KEEPALIVE is %d: %v", on, err)
			}
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// failing is a guest's UDP socket that fails at each read, and at once.
type failing struct {
	net.Conn
	reads atomic.Int64
}

func (c *failing) Read([]byte) (int, error) {
	c.reads.Add(1)
	return 0, os.NewSyscallError("read", unix.ECONNREFUSED)
}

func (c *failing) Write(p []byte) (int, error) { return len(p), nil }

func TestSocketThatFailsForEverDoesNotSpin(t *testing.T) {
	t.Parallel()
	here, there := net.Pipe()
	defer there.Close()
	c := &failing{Conn: here}
	f := open(t, Config{Backend: &guests{connect: func(context.Context, string, uint16, bool) (net.Conn, uint64, error) {
		if c.reads.Load() > 0 {
			return nil, 0, errors.New("the test is over")
		}
		return c, 1, nil
	}}})
	l := forwarded(t, f, Lease{UDP: true})
	if _, err := dialUDP(t, l).Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the flow has ended", func() bool { s := only(t, f); return s.Accepted == 1 && s.Open == 0 })
	if n := c.reads.Load(); n != maxFailures {
		t.Errorf("it was read %d times", n)
	}
}
