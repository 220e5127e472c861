package forward

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// guests is a Backend that dials servers of the test, as a guest's would be.
type guests struct {
	mu         sync.Mutex
	addr       map[string]string // by sandbox
	generation map[string]uint64
	active     map[string]int
	// connect, if set, is used instead.
	connect func(ctx context.Context, sandbox string, port uint16, udp bool) (net.Conn, uint64, error)
}

func (g *guests) Connect(ctx context.Context, sandbox string, port uint16, udp bool) (net.Conn, uint64, error) {
	if g.connect != nil {
		return g.connect(ctx, sandbox, port, udp)
	}
	g.mu.Lock()
	addr, generation := g.addr[sandbox], g.generation[sandbox]
	g.mu.Unlock()
	network := "tcp"
	if udp {
		network = "udp"
	}
	if strings.HasPrefix(addr, "/") {
		network = "unix"
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	return conn, generation, err
}

func (g *guests) Active(sandbox string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.active == nil {
		g.active = map[string]int{}
	}
	g.active[sandbox]++
}

// leadTo is a Backend whose every sandbox is one server.
func leadTo(addr string) *guests {
	return &guests{connect: func(ctx context.Context, _ string, _ uint16, udp bool) (net.Conn, uint64, error) {
		network := "tcp"
		if udp {
			network = "udp"
		}
		if strings.HasPrefix(addr, "/") {
			network = "unix"
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		return conn, 1, err
	}}
}

// ranges hands each test ports of its own, clear of ephemeral ones.
var ranges = func() func() (first, last uint16) {
	var mu sync.Mutex
	next := uint16(14000)
	return func() (uint16, uint16) {
		mu.Lock()
		defer mu.Unlock()
		next += 50
		return next - 50, next - 1
	}
}()

func open(t testing.TB, cfg Config) *Forwarder {
	t.Helper()
	if cfg.First == 0 {
		cfg.First, cfg.Last = ranges()
	}
	f := New(cfg)
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func field(i int) string { return fmt.Sprintf("spec.ports[%d]", i) }

// forwarded reserves and opens one lease.
func forwarded(t testing.TB, f *Forwarder, l Lease) Lease {
	t.Helper()
	if l.Sandbox == "" {
		l.Sandbox = "web"
	}
	l.GuestPort = 80
	reserved, err := f.Reserve([]Lease{l}, field)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Open(reserved[0]); err != nil {
		t.Fatal(err)
	}
	return reserved[0]
}

func (l Lease) dialAddress() string { return fmt.Sprintf("127.0.0.1:%d", l.HostPort) }

func dial(t testing.TB, l Lease) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", l.dialAddress())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}

// server accepts connections at a network address and hands each to serve.
func server(t testing.TB, network string, serve func(net.Conn)) string {
	t.Helper()
	at := "127.0.0.1:0"
	if network == "unix" {
		dir, err := os.MkdirTemp("", "fwd")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		at = dir + "/s"
	}
	listener, err := net.Listen(network, at)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				stop := context.AfterFunc(t.Context(), func() { conn.Close() })
				defer stop()
				defer conn.Close()
				serve(conn)
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		all.Wait()
	})
	return listener.Addr().String()
}

func echo(conn net.Conn) {
	_, _ = io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn})
}

// eventually waits for what other goroutines bring about.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// networks are what a guest's connection may be.
func networks(t *testing.T, test func(t *testing.T, network string)) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			test(t, network)
		})
	}
}

func TestCarriesBothWaysAndCounts(t *testing.T) {
	t.Parallel()
	networks(t, func(t *testing.T, network string) {
		f := open(t, Config{Backend: leadTo(server(t, network, echo))})
		l := forwarded(t, f, Lease{})
		conn := dial(t, l)
		sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<20/16*24)
		go func() {
			_, _ = conn.Write(sent)
			_ = conn.CloseWrite()
		}()
		got, err := io.ReadAll(conn)
		if err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("%d of %d bytes, equal %v: %v", len(got), len(sent), bytes.Equal(got, sent), err)
		}
		eventually(t, "the connection is over", func() bool { return f.OpenConnections("web") == 0 })
		s := f.Leases("web")[0]
		if s.BytesIn != uint64(len(sent)) || s.BytesOut != uint64(len(sent)) || s.Accepted != 1 || s.Failed != 0 || s.Open != 0 || s.State != StateListening {
			t.Errorf("status: %+v", s)
		}
		f.Release(l)
		if tcp, udp := f.Totals(); tcp.BytesIn != uint64(len(sent)) || tcp.Leases != 0 || tcp.Accepted != 1 || udp != (Totals{}) {
			t.Errorf("totals after release: %+v, %+v", tcp, udp)
		}
	})
}

func TestHalfCloseIsPassedOnAfterTheData(t *testing.T) {
	t.Parallel()
	networks(t, func(t *testing.T, network string) {
		// The guest answers only once it has seen the end of the request.
		addr := server(t, network, func(conn net.Conn) {
			request, err := io.ReadAll(conn)
			if err != nil {
				return
			}
			_, _ = fmt.Fprintf(conn, "got %d", len(request))
		})
		f := open(t, Config{Backend: leadTo(addr)})
		conn := dial(t, forwarded(t, f, Lease{}))
		_, _ = conn.Write(make([]byte, 3<<20))
		_ = conn.CloseWrite()
		if got, err := io.ReadAll(conn); err != nil || string(got) != "got 3145728" {
			t.Fatalf("%q, %v", got, err)
		}
	})
}

func TestGuestHalfCloseLeavesTheOtherDirectionOpen(t *testing.T) {
	t.Parallel()
	networks(t, func(t *testing.T, network string) {
		got := make(chan string, 1)
		addr := server(t, network, func(conn net.Conn) {
			_, _ = conn.Write([]byte("bye"))
			_ = conn.(interface{ CloseWrite() error }).CloseWrite()
			all, err := io.ReadAll(conn)
			got <- fmt.Sprint(string(all), err)
		})
		f := open(t, Config{Backend: leadTo(addr)})
		conn := dial(t, forwarded(t, f, Lease{}))
		if got, err := io.ReadAll(conn); err != nil || string(got) != "bye" {
			t.Fatalf("%q, %v", got, err)
		}
		_, _ = conn.Write([]byte("still here"))
		conn.Close()
		if got := <-got; got != "still here<nil>" {
			t.Errorf("guest read %q", got)
		}
	})
}

func TestResetOfTheGuestReachesTheClient(t *testing.T) {
	t.Parallel()
	addr := server(t, "tcp", func(conn net.Conn) {
		buf := make([]byte, 5)
		_, _ = io.ReadFull(conn, buf)
		_ = conn.(*net.TCPConn).SetLinger(0)
	})
	f := open(t, Config{Backend: leadTo(addr)})
	conn := dial(t, forwarded(t, f, Lease{}))
	_, _ = conn.Write([]byte("hello"))
	if _, err := io.ReadAll(conn); !isReset(err) {
		t.Errorf("the client saw %v, not a reset", err)
	}
}

func TestResetOfTheClientReachesTheGuest(t *testing.T) {
	t.Parallel()
	for _, half := range []bool{false, true} {
		t.Run(fmt.Sprintf("half-closed=%v", half), func(t *testing.T) {
			t.Parallel()
			got := make(chan error, 1)
			seen := make(chan struct{})
			addr := server(t, "tcp", func(conn net.Conn) {
				if half {
					// It waits for nothing that the client could send.
					_, _ = io.ReadAll(conn)
					close(seen)
					_, err := io.Copy(io.Discard, broken{conn.(*net.TCPConn)})
					got <- err
					return
				}
				_, _ = io.ReadFull(conn, make([]byte, 5))
				close(seen)
				_, err := io.ReadAll(conn)
				got <- err
			})
			f := open(t, Config{Backend: leadTo(addr)})
			conn := dial(t, forwarded(t, f, Lease{}))
			_, _ = conn.Write([]byte("hello"))
			if half {
				_ = conn.CloseWrite()
			}
			<-seen
			_ = conn.SetLinger(0)
			conn.Close()
			if err := <-got; !isReset(err) {
				t.Errorf("the guest saw %v, not a reset", err)
			}
			eventually(t, "the connection is over", func() bool { return f.OpenConnections("web") == 0 })
		})
	}
}

// broken reads nothing and returns once the connection is reset.
type broken struct{ conn *net.TCPConn }

func (b broken) Read([]byte) (int, error) {
	raw, err := b.conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var code int
	err = raw.Read(func(fd uintptr) bool {
		code, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		return code != 0
	})
	if err == nil {
		err = syscall.Errno(code)
	}
	return 0, err
}

func TestSlowReaderStopsTheWriter(t *testing.T) {
	t.Parallel()
	networks(t, func(t *testing.T, network string) {
		free := make(chan struct{})
		total := make(chan int64, 1)
		addr := server(t, network, func(conn net.Conn) {
			select {
			case <-free:
			case <-t.Context().Done():
			}
			n, _ := io.Copy(io.Discard, conn)
			total <- n
		})
		f := open(t, Config{Backend: leadTo(addr)})
		conn := dial(t, forwarded(t, f, Lease{}))
		_ = conn.SetWriteDeadline(time.Now().Add(700 * time.Millisecond))
		written, chunk := int64(0), make([]byte, 1<<20)
		for {
			n, err := conn.Write(chunk)
			written += int64(n)
			if err != nil {
				break
			}
			if written > 128<<20 {
				t.Fatal("the writer was never stopped")
			}
		}
		close(free)
		_ = conn.CloseWrite()
		if got := <-total; got != written {
			t.Errorf("the guest read %d of %d bytes", got, written)
		}
	})
}

func TestStuckGuestLearnsThatItsClientWasReset(t *testing.T) {
	t.Parallel()
	reset := make(chan error, 1)
	addr := server(t, "tcp", func(conn net.Conn) {
		_, err := io.Copy(io.Discard, broken{conn.(*net.TCPConn)})
		reset <- err
	})
	f := open(t, Config{Backend: leadTo(addr)})
	f.stall = 20 * time.Millisecond
	conn := dial(t, forwarded(t, f, Lease{}))
	_ = conn.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	for chunk := make([]byte, 1<<20); ; {
		if _, err := conn.Write(chunk); err != nil {
			break
		}
	}
	_ = conn.SetLinger(0)
	conn.Close()
	if err := <-reset; !isReset(err) {
		t.Errorf("the guest saw %v", err)
	}
}

func TestGuestThatCannotBeReachedLooksLikeAReset(t *testing.T) {
	t.Parallel()
	f := open(t, Config{Backend: &guests{connect: func(context.Context, string, uint16, bool) (net.Conn, uint64, error) {
		return nil, 0, errors.New("nothing listens on port 80 inside")
	}}})
	// The reset may come as soon as the connection is there.
	conn, err := net.Dial("tcp", forwarded(t, f, Lease{}).dialAddress())
	if err == nil {
		defer conn.Close()
		_, err = io.ReadAll(conn)
	}
	if !isReset(err) {
		t.Errorf("the client saw %v, not a reset", err)
	}
	eventually(t, "it is counted", func() bool {
		s := f.Leases("web")[0]
		return s.Failed == 1 && s.Open == 0 && s.LastError == "nothing listens on port 80 inside"
	})
}

func TestConnectionThatWrapsAnotherIsCarriedToo(t *testing.T) {
	t.Parallel()
	addr := server(t, "tcp", echo)
	backend := leadTo(addr)
	dialled := backend.connect
	backend.connect = func(ctx context.Context, s string, port uint16, udp bool) (net.Conn, uint64, error) {
		conn, generation, err := dialled(ctx, s, port, udp)
		if err != nil {
			return nil, 0, err
		}
		return wrapped{conn.(*net.TCPConn)}, generation, nil
	}
	f := open(t, Config{Backend: backend})
	conn := dial(t, forwarded(t, f, Lease{}))
	sent := bytes.Repeat([]byte("xyz"), 1<<20)
	go func() {
		_, _ = conn.Write(sent)
		_ = conn.CloseWrite()
	}()
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d of %d bytes, %v", len(got), len(sent), err)
	}
}

type wrapped struct{ *net.TCPConn }

func TestActivityIsToldWhileAConnectionIsOpen(t *testing.T) {
	t.Parallel()
	backend := leadTo(server(t, "tcp", echo))
	f := open(t, Config{Backend: backend, ActivityInterval: 5 * time.Millisecond})
	l := forwarded(t, f, Lease{})
	count := func() int {
		backend.mu.Lock()
		defer backend.mu.Unlock()
		return backend.active["web"]
	}
	if count() != 0 {
		t.Error("active without a connection")
	}
	conn := dial(t, l)
	eventually(t, "active again and again", func() bool { return count() > 10 })
	conn.Close()
	eventually(t, "the connection is over", func() bool { return f.OpenConnections("web") == 0 })
	// One that was being told and the one for its end may still come.
	after := count()
	time.Sleep(50 * time.Millisecond)
	if now := count(); now > after+2 {
		t.Errorf("active %d times after the last connection", now-after)
	}
}
