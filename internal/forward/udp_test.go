package forward

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// udpServer answers each datagram with its name, the client's port as it sees
// it, and what was sent.
func udpServer(t testing.TB, name string) string {
	t.Helper()
	socket, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := socket.ReadFrom(buf)
			if err != nil {
				return
			}
			if name == "echo" {
				_, _ = socket.WriteTo(buf[:n], from)
				continue
			}
			_, _ = socket.WriteTo(fmt.Appendf(nil, "%s %d %s", name, from.(*net.UDPAddr).Port, buf[:n]), from)
		}
	})
	t.Cleanup(func() {
		socket.Close()
		all.Wait()
	})
	return socket.LocalAddr().String()
}

func dialUDP(t testing.TB, l Lease) net.Conn {
	t.Helper()
	conn, err := net.Dial("udp", l.dialAddress())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// exchange sends and returns the answer.
func exchange(t testing.TB, conn net.Conn, data string) string {
	t.Helper()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte(data)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<16)
	n, err := conn.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n])
}

func TestEachClientHasAFlowOfItsOwn(t *testing.T) {
	t.Parallel()
	f := open(t, Config{Backend: leadTo(udpServer(t, "dns"))})
	l := forwarded(t, f, Lease{UDP: true})
	one, two := dialUDP(t, l), dialUDP(t, l)
	a, b, again := exchange(t, one, "a"), exchange(t, two, "b"), exchange(t, one, "a")
	if a != again || a == strings.Replace(b, " b", " a", 1) {
		t.Errorf("answers %q, %q, %q", a, b, again)
	}
	eventually(t, "all is counted", func() bool {
		s := f.Leases("web")[0]
		return s.Open == 2 && s.Accepted == 2 && s.BytesIn == 3
	})
}

func TestDatagramsKeepTheirBounds(t *testing.T) {
	t.Parallel()
	f := open(t, Config{Backend: leadTo(udpServer(t, "echo"))})
	conn := dialUDP(t, forwarded(t, f, Lease{UDP: true}))
	for _, size := range []int{0, 1, 1472, 9000, maxDatagram} {
		data := strings.Repeat("x", size)
		if got := exchange(t, conn, data); got != data {
			t.Errorf("sent %d bytes, got %d", size, len(got))
		}
	}
}

func TestSilentFlowsEnd(t *testing.T) {
	t.Parallel()
	f := open(t, Config{Backend: leadTo(udpServer(t, "dns")), FlowTimeout: 80 * time.Millisecond})
	conn := dialUDP(t, forwarded(t, f, Lease{UDP: true}))
	first := exchange(t, conn, "x")
	eventually(t, "the flow ends", func() bool { return f.OpenConnections("web") == 0 })
	if again := exchange(t, conn, "x"); again == first {
		t.Errorf("the flow went on: %q", again)
	}
}

func TestTheSilentestFlowMakesRoom(t *testing.T) {
	t.Parallel()
	f := open(t, Config{Backend: leadTo(udpServer(t, "dns")), MaxFlows: 3})
	l := forwarded(t, f, Lease{UDP: true})
	for range 20 {
		exchange(t, dialUDP(t, l), "x")
	}
	eventually(t, "3 flows are left", func() bool { return f.OpenConnections("web") == 3 })
}

func TestDatagramsWaitForTheSandboxAndNoMoreThanFit(t *testing.T) {
	t.Parallel()
	ready := make(chan struct{})
	addr := udpServer(t, "echo")
	f := open(t, Config{Backend: &guests{connect: func(ctx context.Context, s string, port uint16, udp bool) (net.Conn, uint64, error) {
		select {
		case <-ready:
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
		return leadTo(addr).connect(ctx, s, port, udp)
	}}})
	l := forwarded(t, f, Lease{UDP: true})
	conn := dialUDP(t, l)
	for i := range flowQueue + 10 {
		if _, err := fmt.Fprint(conn, i); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it is queued or dropped", func() bool {
			f.mu.Lock()
			held := f.leases[key{true, l.HostPort}]
			f.mu.Unlock()
			held.flows.mu.Lock()
			defer held.flows.mu.Unlock()
			for _, fl := range held.flows.byClient {
				return len(fl.queue)+int(held.dropped.Load()) == i+1
			}
			return false
		})
	}
	close(ready)
	buf := make([]byte, 100)
	for i := range flowQueue {
		_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		n, err := conn.Read(buf)
		if err != nil || string(buf[:n]) != fmt.Sprint(i) {
			t.Fatalf("answer %d is %q, %v", i, buf[:n], err)
		}
	}
	if s := f.Leases("web")[0]; s.Dropped != 10 {
		t.Errorf("%d datagrams were dropped, not 10", s.Dropped)
	}
}

func TestAFloodDoesNotAskASandboxThatCannotStartEachTime(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	f := open(t, Config{Backend: &guests{connect: func(context.Context, string, uint16, bool) (net.Conn, uint64, error) {
		asked.Add(1)
		return nil, 0, errors.New("it does not start")
	}}})
	conn := dialUDP(t, forwarded(t, f, Lease{UDP: true}))
	for range 500 {
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the flood has passed", func() bool { return f.Leases("web")[0].Dropped > 100 })
	if n := asked.Load(); n > 3 {
		t.Errorf("asked %d times", n)
	}
}

func TestAPortThatIsClosedInsideDoesNotEndTheFlow(t *testing.T) {
	t.Parallel()
	// A port that was somebody's a moment ago.
	socket, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := socket.LocalAddr().String()
	socket.Close()
	f := open(t, Config{Backend: leadTo(addr)})
	conn := dialUDP(t, forwarded(t, f, Lease{UDP: true}))
	for range 5 {
		_, _ = conn.Write([]byte("x"))
	}
	eventually(t, "all were carried", func() bool { s := f.Leases("web")[0]; return s.BytesIn+s.Dropped == 5 })
	if socket, err = net.ListenPacket("udp", addr); err != nil {
		t.Skip("somebody took the port:", err)
	}
	defer socket.Close()
	_, _ = conn.Write([]byte("now"))
	buf := make([]byte, 10)
	_ = socket.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, _, err := socket.ReadFrom(buf); err != nil || string(buf[:n]) != "now" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	if s := f.Leases("web")[0]; s.Accepted != 1 {
		t.Errorf("%d flows", s.Accepted)
	}
}
