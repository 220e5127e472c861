package guest

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/sandbox"
)

func TestOnlyFreshSocketsAreLent(t *testing.T) {
	t.Parallel()
	connected, err := net.Dial("tcp", serving(t))
	if err != nil {
		t.Fatal(err)
	}
	defer connected.Close()
	six, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(six)
	good := freshSocket(t)

	cases := lies(t)
	cases["a connected socket"] = []int{number(t, connected.(*net.TCPConn))}
	cases["a socket of IPv6"] = []int{six}
	for name, fds := range cases {
		g := passing(t, &guestv1.Response{}, fds...)
		noneLeft(t, name, func() {
			if lent, err := g.LendSockets(t.Context(), 3); err == nil || !errors.Is(err, sandbox.ErrGuest) {
				t.Errorf("%s: %v, %v", name, lent, err)
				closeSockets(lent)
			}
		})
	}

	refusing := passing(t, &guestv1.Response{Failure: &guestv1.Failure{Code: guestv1.Failure_CODE_UNIMPLEMENTED}}, good)
	noneLeft(t, "with a failure", func() {
		if lent, err := refusing.LendSockets(t.Context(), 3); !errors.Is(err, sandbox.ErrUnsupported) {
			t.Errorf("%v, %v", lent, err)
		}
	})

	for name, c := range map[string]struct {
		fds  []int
		want int
	}{
		"a good one among them":    {append(cases["a file"], good), 1},
		"more than were asked for": {[]int{good, good, good, good}, 3},
	} {
		g := passing(t, &guestv1.Response{}, c.fds...)
		noneLeft(t, name, func() {
			lent, err := g.LendSockets(t.Context(), 3)
			if err != nil || len(lent) != c.want {
				t.Errorf("%s: %d, %v; want %d", name, len(lent), err, c.want)
			}
			closeSockets(lent)
		})
	}
}

func freshSocket(t *testing.T) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// serving is the address of a service that says hello to whoever connects.
func serving(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, "hello")
			conn.Close()
		}
	}()
	return listener.Addr().String()
}

func TestLentSocketConnects(t *testing.T) {
	t.Parallel()
	address := netip.MustParseAddrPort(serving(t))
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	lend := func() *Socket {
		// The lender's own is closed at the end: a descriptor passed is one more.
		lent, err := passing(t, &guestv1.Response{}, freshSocket(t)).LendSockets(t.Context(), 1)
		if err != nil {
			t.Fatal(err)
		}
		return lent[0]
	}

	conn, err := lend().Connect(t.Context(), address.Port())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if said, err := io.ReadAll(conn); string(said) != "hello" || err != nil {
		t.Errorf("read %q, %v", said, err)
	}

	nobody := lend()
	if _, err := nobody.Connect(t.Context(), netip.MustParseAddrPort(free.Addr().String()).Port()); !errors.Is(err, sandbox.ErrRefused) {
		t.Errorf("%v, want that it is refused", err)
	}
	nobody.Close() // nothing is left to close, and nothing else is closed instead
}

func TestLentSocketWaitsForAFullBacklogNoLongerThanItsCaller(t *testing.T) {
	t.Parallel()
	listener := freshSocket(t)
	if err := errors.Join(unix.Bind(listener, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(listener, 0)); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Getsockname(listener)
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(at.(*unix.SockaddrInet4).Port)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var failure error
	for range 4 { // a backlog of 0 has room for one
		lent, err := passing(t, &guestv1.Response{}, freshSocket(t)).LendSockets(t.Context(), 1)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := lent[0].Connect(ctx, port)
		if err != nil {
			failure = err
			break
		}
		defer conn.Close()
	}
	if failure == nil || ctx.Err() == nil {
		t.Errorf("%v, want that it waited until its caller gave up", failure)
	}
}
