package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/sandbox"
)

func TestReserveGivesNoNumberTwice(t *testing.T) {
	t.Parallel()
	f := open(t, Config{Backend: &guests{}})
	var mu sync.Mutex
	seen := map[uint16]string{}
	var all sync.WaitGroup
	for i := range 50 {
		all.Go(func() {
			name := fmt.Sprint("s", i)
			got, err := f.Reserve([]Lease{{Sandbox: name, GuestPort: 80}}, field)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if other := seen[got[0].HostPort]; other != "" {
				t.Errorf("%d is of %s and %s", got[0].HostPort, other, name)
			}
			seen[got[0].HostPort] = name
		})
	}
	all.Wait()
	_, err := f.Reserve([]Lease{{Sandbox: "late", GuestPort: 80}}, field)
	if field, ok := errors.AsType[*sandbox.FieldError](err); !ok || field.Field != "spec.ports[0].host_port" || !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("a range that is used up: %v", err)
	}
}

func TestReserveTakesAllOrNone(t *testing.T) {
	t.Parallel()
	first, last := ranges()
	f := open(t, Config{Backend: &guests{}, First: first, Last: last})
	fixed := last + 20000
	if _, err := f.Reserve([]Lease{{Sandbox: "a", GuestPort: 1, HostPort: fixed}}, field); err != nil {
		t.Fatal(err)
	}
	_, err := f.Reserve([]Lease{{Sandbox: "b", GuestPort: 1}, {Sandbox: "b", GuestPort: 2, HostPort: fixed}}, field)
	if err == nil || !errors.Is(err, sandbox.ErrExists) || err.Error() != fmt.Sprintf("spec.ports[1].host_port: %d is leased to sandbox a", fixed) {
		t.Errorf("a number of another sandbox: %v", err)
	}
	if held := f.Leases("b"); len(held) != 0 {
		t.Errorf("held after an error: %+v", held)
	}
}

func TestReserveTakesTheNumberReleasedLongestAgo(t *testing.T) {
	t.Parallel()
	first, _ := ranges()
	f := open(t, Config{Backend: leadTo("127.0.0.1:1"), First: first, Last: first + 2})
	var got []uint16
	for range 7 {
		l := forwarded(t, f, Lease{})
		got = append(got, l.HostPort-first)
		f.Release(l)
	}
	if fmt.Sprint(got) != "[0 1 2 0 1 2 0]" {
		t.Errorf("numbers: %v", got)
	}
}

func TestANumberIsOfOneSandboxInBothProtocols(t *testing.T) {
	t.Parallel()
	first, _ := ranges()
	f := open(t, Config{Backend: leadTo("127.0.0.1:1"), First: first, Last: first + 1})
	tcp, udp := forwarded(t, f, Lease{Sandbox: "a"}), forwarded(t, f, Lease{Sandbox: "b", UDP: true})
	if tcp.HostPort == udp.HostPort {
		t.Errorf("both have %d", tcp.HostPort)
	}
	if twin := forwarded(t, f, Lease{Sandbox: "a", UDP: true}); twin.HostPort != tcp.HostPort {
		t.Errorf("%d and %d", twin.HostPort, tcp.HostPort)
	}
}

func TestReserveKeepsAwayFromStrangers(t *testing.T) {
	t.Parallel()
	for _, network := range []string{"tcp", "udp"} {
		for _, at := range []string{"127.0.0.1", "0.0.0.0", "127.0.0.9", "[::]", "[::1]"} {
			t.Run(network+" "+at, func(t *testing.T) {
				t.Parallel()
				first, _ := ranges()
				stranger(t, network, fmt.Sprintf("%s:%d", at, first))
				f := open(t, Config{Backend: &guests{}, First: first, Last: first + 1})
				got, err := f.Reserve([]Lease{{Sandbox: "a", GuestPort: 1, UDP: network == "udp"}}, field)
				if err != nil || got[0].HostPort != first+1 {
					t.Errorf("%+v, %v", got, err)
				}
				_, err = f.Reserve([]Lease{{Sandbox: "a", GuestPort: 1, UDP: network == "udp", HostPort: first}}, field)
				if !errors.Is(err, sandbox.ErrExists) || !strings.Contains(err.Error(), "host_port: ") || !strings.HasSuffix(err.Error(), "in use by another program") {
					t.Errorf("fixed: %v", err)
				}
			})
		}
	}
}

// stranger listens as another program would that shares what it can.
func stranger(t testing.TB, network, at string) io.Closer {
	t.Helper()
	var closer io.Closer
	var err error
	if network == "udp" {
		closer, err = net.ListenPacket(network, at)
	} else {
		closer, err = net.Listen(network, at)
	}
	if err != nil {
		if strings.Contains(at, "[") {
			t.Skip("no IPv6 here:", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() { closer.Close() })
	return closer
}

func TestReserveNamesTheFieldThatIsWrong(t *testing.T) {
	t.Parallel()
	f := open(t, Config{Backend: &guests{}})
	for _, test := range []struct {
		lease Lease
		want  string
		is    error
	}{
		{Lease{GuestPort: 1, BindAddress: "localhost"}, `spec.ports[0].bind_address: "localhost" is not an IP address`, sandbox.ErrInvalid},
		{Lease{GuestPort: 1, BindAddress: "192.0.2.7"}, "spec.ports[0].bind_address: 192.0.2.7 is no address of this host", sandbox.ErrInvalid},
		{Lease{GuestPort: 1, BindAddress: "fe80::1%nothing0"}, "spec.ports[0].bind_address: fe80::1%nothing0 is no address of this host", sandbox.ErrInvalid},
		{Lease{}, "spec.ports[0].guest_port: is not from 1 to 65535", sandbox.ErrInvalid},
	} {
		_, err := f.Reserve([]Lease{test.lease}, field)
		if err == nil || err.Error() != test.want || !errors.Is(err, test.is) {
			t.Errorf("%+v: %v", test.lease, err)
		}
	}
	if held := f.Leases(""); len(held) != 0 {
		t.Errorf("held after errors: %+v", held)
	}
}

func TestOpenTriesOnUntilTheStrangerLeaves(t *testing.T) {
	t.Parallel()
	first, last := ranges()
	for _, udp := range []bool{false, true} {
		l := Lease{Sandbox: "web", GuestPort: 80, HostPort: first, UDP: udp}
		t.Run(l.Protocol(), func(t *testing.T) {
			t.Parallel()
			other := stranger(t, l.Protocol(), l.dialAddress())
			f := open(t, Config{Backend: leadTo(server(t, "tcp", echo)), First: first, Last: last})
			want := fmt.Sprintf("port %d is in use by another program", first)
			if err := f.Open(l); err == nil || err.Error() != want {
				t.Fatalf("open: %v", err)
			}
			if s := f.Leases("web")[0]; s.State != StateBlocked || s.Detail != want {
				t.Errorf("status: %+v", s)
			}
			if err := f.Open(l); err == nil || err.Error() != want {
				t.Errorf("opened again: %v", err)
			}
			other.Close()
			eventually(t, "it listens", func() bool { s := f.Leases("web")[0]; return s.State == StateListening && s.Detail == "" })
			if err := f.Open(l); err != nil {
				t.Errorf("opened once it listens: %v", err)
			}
		})
	}
}

func TestOpenRefusesTheNumberOfAnother(t *testing.T) {
	t.Parallel()
	f := open(t, Config{Backend: leadTo("127.0.0.1:1")})
	l := forwarded(t, f, Lease{Sandbox: "a"})
	l.Sandbox = "b"
	if err := f.Open(l); !errors.Is(err, sandbox.ErrExists) {
		t.Errorf("open: %v", err)
	}
	f.Release(l) // not its own: nothing happens
	if s := f.Leases("a"); len(s) != 1 || s[0].State != StateListening {
		t.Errorf("of a: %+v", s)
	}
}

func TestReleaseEndsWhatIsOpenWithAReset(t *testing.T) {
	t.Parallel()
	networks(t, func(t *testing.T, network string) {
		f := open(t, Config{Backend: leadTo(server(t, network, echo))})
		l := forwarded(t, f, Lease{})
		conn := dial(t, l)
		_, _ = conn.Write([]byte("x"))
		_, _ = io.ReadFull(conn, make([]byte, 1))
		f.Release(l)
		if _, err := conn.Read(make([]byte, 1)); !isReset(err) {
			t.Errorf("the client saw %v", err)
		}
		if _, err := net.Dial("tcp", l.dialAddress()); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("dialled after release: %v", err)
		}
		if n := f.OpenConnections("web"); n != 0 || len(f.Leases("")) != 0 {
			t.Errorf("%d connections, leases %+v", n, f.Leases(""))
		}
	})
}

func TestReleaseDoesNotWaitForABoot(t *testing.T) {
	t.Parallel()
	ended := make(chan struct{})
	f := open(t, Config{Backend: &guests{connect: func(ctx context.Context, _ string, _ uint16, _ bool) (net.Conn, uint64, error) {
		<-ctx.Done()
		close(ended)
		return nil, 0, ctx.Err()
	}}})
	l := forwarded(t, f, Lease{})
	conn := dial(t, l)
	eventually(t, "it waits", func() bool { return f.Leases("web")[0].Pending == 1 })
	f.Release(l)
	select {
	case <-ended:
	default:
		t.Error("released while it still connects")
	}
	if _, err := conn.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("the client saw %v", err)
	}
}

func TestCutOffEndsThePastBootAlone(t *testing.T) {
	t.Parallel()
	addr := server(t, "tcp", echo)
	backend := &guests{addr: map[string]string{"web": addr}, generation: map[string]uint64{"web": 1}}
	f := open(t, Config{Backend: backend})
	l := forwarded(t, f, Lease{})
	ping := func(conn net.Conn) error {
		_, _ = conn.Write([]byte("x"))
		_, err := io.ReadFull(conn, make([]byte, 1))
		return err
	}
	old := dial(t, l)
	if err := ping(old); err != nil {
		t.Fatal(err)
	}
	backend.mu.Lock()
	backend.generation["web"] = 2
	backend.mu.Unlock()
	present := dial(t, l)
	if err := ping(present); err != nil {
		t.Fatal(err)
	}
	f.CutOff("web", 1)
	if _, err := old.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("the client of the past boot saw %v", err)
	}
	if err := ping(present); err != nil {
		t.Errorf("the client of the present boot: %v", err)
	}
	// A connection that comes to a past boot late is cut off as well.
	backend.mu.Lock()
	backend.generation["web"] = 1
	backend.mu.Unlock()
	late, err := net.Dial("tcp", l.dialAddress())
	if err == nil {
		defer late.Close()
		// A reset is told once: to the write if it came before that.
		if _, err = late.Write([]byte("x")); err == nil {
			_, err = io.ReadFull(late, make([]byte, 1))
		}
	}
	if !isReset(err) {
		t.Errorf("a late client of the past boot saw %v", err)
	}
}

func TestCutOffDeliversWhatTheSandboxSentToItsEnd(t *testing.T) {
	t.Parallel()
	const size = 200 << 10 // fits into socket buffers
	addr := server(t, "tcp", func(conn net.Conn) {
		_, _ = conn.Write(make([]byte, size))
		_ = conn.(*net.TCPConn).CloseWrite()
		_, _ = io.Copy(io.Discard, conn)
	})
	f := open(t, Config{Backend: leadTo(addr)})
	conn := dial(t, forwarded(t, f, Lease{}))
	eventually(t, "all has been sent", func() bool { return f.Leases("web")[0].BytesOut == size })
	f.mu.Lock()
	var c *connection
	for _, l := range f.leases {
		for held := range l.carriers {
			c = held.(*connection)
		}
	}
	f.mu.Unlock()
	eventually(t, "its end too", c.delivered.Load)
	f.CutOff("web", 1)
	if got, err := io.ReadAll(conn); err != nil || len(got) != size {
		t.Errorf("%d of %d bytes, %v", len(got), size, err)
	}
}
