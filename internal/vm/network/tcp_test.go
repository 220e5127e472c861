package network

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/sandbox"
)

func TestTCPCarriesBothWays(t *testing.T) {
	t.Parallel()
	n, g := start(t, Config{})
	conn := g.dial(serveTCP(t, echo))
	sent := pattern(3 << 20)
	var writing sync.WaitGroup
	writing.Go(func() {
		if _, err := conn.Write(sent); err != nil {
			t.Error(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Error(err)
		}
	})
	got, err := io.ReadAll(conn)
	writing.Wait()
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("%d of %d bytes came back, equal: %v, %v", len(got), len(sent), bytes.Equal(got, sent), err)
	}
	eventually(t, "the connection is closed", func() bool { return n.Stats().TCPOpen == 0 })
	s := n.Stats()
	if s.TCPTotal != 1 || s.BytesSent < 3<<20 || s.BytesReceived < 3<<20 || s.Spoofed != 0 {
		t.Errorf("%+v", s)
	}
}

func TestTCPHalfCloseIsCarriedEachWay(t *testing.T) {
	t.Parallel()
	_, g := start(t, Config{})
	// The guest ends first, and is answered then.
	conn := g.dial(serveTCP(t, func(host *net.TCPConn) {
		got, err := io.ReadAll(host)
		if err != nil {
			t.Error(err)
		}
		_, _ = host.Write(append(got, "!"...))
	}))
	_, _ = conn.Write([]byte("a question"))
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); string(got) != "a question!" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	// The host ends first, and is answered then.
	heard := make(chan string, 1)
	conn = g.dial(serveTCP(t, func(host *net.TCPConn) {
		_, _ = host.Write([]byte("hello"))
		_ = host.CloseWrite()
		got, err := io.ReadAll(host)
		heard <- string(got)
		if err != nil {
			t.Error(err)
		}
	}))
	got, err := io.ReadAll(conn)
	if string(got) != "hello" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	_, _ = conn.Write([]byte("goodbye"))
	_ = conn.CloseWrite()
	if got := <-heard; got != "goodbye" {
		t.Errorf("the host heard %q", got)
	}
}

func TestTCPResetIsCarriedEachWay(t *testing.T) {
	t.Parallel()
	n, g := start(t, Config{})
	accepted, ended := make(chan struct{}), make(chan error, 1)
	addr := serveTCP(t, func(host *net.TCPConn) {
		close(accepted)
		_, err := io.ReadAll(host)
		ended <- err
	})
	conn, abort := g.dialAbortable(addr)
	_, _ = conn.Write([]byte("x"))
	<-accepted
	abort()
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the host saw %v", err)
	}

	toGuest := g.dial(serveTCP(t, func(host *net.TCPConn) {
		buf := make([]byte, 1)
		_, _ = host.Read(buf)
		_ = host.SetLinger(0)
	}))
	_, _ = toGuest.Write([]byte("x"))
	if _, err := io.ReadAll(toGuest); err == nil || !strings.Contains(err.Error(), "reset") {
		t.Errorf("the guest saw %v", err)
	}
	eventually(t, "both are closed", func() bool { return n.Stats().TCPOpen == 0 })
}

func TestTCPResetByAGuestReachesAHostThatIsNotRead(t *testing.T) {
	t.Parallel()
	n, g := start(t, Config{})
	release, ended := make(chan struct{}), make(chan error, 1)
	conn, abort := g.dialAbortable(serveTCP(t, func(host *net.TCPConn) {
		<-release // all buffers are full meanwhile
		_, err := io.Copy(io.Discard, host)
		ended <- err
	}))
	_ = conn.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	for {
		if _, err := conn.Write(make([]byte, 1<<20)); err != nil {
			break
		}
	}
	abort()
	eventually(t, "the connection is gone", func() bool { return n.Stats().TCPOpen == 0 })
	close(release)
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the host saw %v", err)
	}
}

func TestWhatCameBeforeAResetIsRead(t *testing.T) {
	t.Parallel()
	_, g := start(t, Config{})
	answer := pattern(100_000)
	// A server that answers early and closes with the rest of the request
	// unread resets: see RFC 2525, section 2.17.
	conn := g.dial(serveTCP(t, func(host *net.TCPConn) {
		_, _ = io.ReadFull(host, make([]byte, 10))
		_, _ = host.Write(answer)
	}))
	_, _ = conn.Write(make([]byte, 100_000))
	got := make([]byte, len(answer))
	if n, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, answer) {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if _, err := io.ReadAll(conn); err == nil {
		t.Error("no reset came")
	}
}

func TestTCPOutcomesOfConnectingAreTheHosts(t *testing.T) {
	t.Parallel()
	host := &loopback{errors: map[string]error{
		"203.0.113.21": syscall.ENETUNREACH, "203.0.113.22": syscall.EHOSTUNREACH, "203.0.113.23": syscall.ECONNREFUSED,
		"203.0.113.24": syscall.ETIMEDOUT, "203.0.113.25": errOwn,
	}}
	n, g := start(t, Config{Dial: host.dial})
	for addr, want := range map[string]string{
		"203.0.113.21:80": "network is unreachable", "203.0.113.22:80": "no route to host",
		"203.0.113.23:80": "connection was refused", "203.0.113.25:80": "connection was refused",
		"192.168.127.1:80": "connection was refused",
	} {
		if _, err := g.tryDial(addr); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", addr, err, want)
		}
	}
	if diff := cmp.Diff([]string{"tcp 203.0.113.25:80 x1"}, refused(n)); diff != "" {
		t.Error(diff)
	}
	// What times out is not answered.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if err := g.dialContext(ctx, "203.0.113.24:80"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("timeout: %v", err)
	}
}

func TestTCPIsNotAcceptedBeforeTheHostHas(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	host := func(ctx context.Context, _ string, _ netip.AddrPort) (net.Conn, error) {
		select {
		case <-release:
		case <-ctx.Done():
		}
		return nil, syscall.ECONNREFUSED
	}
	n, g := start(t, Config{Dial: host})
	done := make(chan error, 1)
	go func() {
		_, err := g.tryDial(far + ":80")
		done <- err
	}()
	eventually(t, "the host is asked", func() bool { return n.Stats().TCPOpen == 1 })
	select {
	case err := <-done:
		t.Errorf("it ended: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	if err := <-done; err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("%v", err)
	}
	if n.Stats().TCPTotal != 0 {
		t.Errorf("%+v", n.Stats())
	}
}

func TestSlowReadersHoldTheSenderBack(t *testing.T) {
	n, g := start(t, Config{})
	const many = 16
	var sent [2]int64
	var mu sync.Mutex
	count := func(i, n int) {
		mu.Lock()
		defer mu.Unlock()
		sent[i] += int64(n)
	}
	stop := make(chan struct{})
	hostSends := serveTCP(t, func(host *net.TCPConn) {
		for {
			n, err := host.Write(make([]byte, 64<<10))
			count(0, n)
			if err != nil {
				return
			}
		}
	})
	hostReadsNot := serveTCP(t, func(*net.TCPConn) { <-stop })
	before := heap()
	for range many {
		g.dial(hostSends) // and does not read
		conn := g.dial(hostReadsNot)
		go func() {
			for {
				n, err := conn.Write(make([]byte, 64<<10))
				count(1, n)
				if err != nil {
					return
				}
			}
		}()
	}
	// Both come to a halt.
	var last [2]int64
	for still := 0; still < 10; time.Sleep(50 * time.Millisecond) {
		mu.Lock()
		if sent == last {
			still++
		} else {
			still, last = 0, sent
		}
		mu.Unlock()
	}
	grown := int64(heap()) - int64(before)
	t.Logf("%d MiB to the guest and %d MiB from it are under way, %d MiB of heap", last[0]>>20, last[1]>>20, grown>>20)
	if grown > many*2*(2*wholeBuffer+2*guestBuffer)+8<<20 { // the guest's stack is in this process, too
		t.Errorf("the heap grew by %d MiB", grown>>20)
	}
	if got := n.Stats().TCPOpen; got != 2*many {
		t.Errorf("%d connections are open", got)
	}
	close(stop)
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestAWedgedGuestBlocksNothing(t *testing.T) {
	t.Parallel()
	n, g := start(t, Config{})
	addr := serveTCP(t, func(host *net.TCPConn) { _, _ = host.Write(make([]byte, 8<<20)) })
	for range 8 {
		g.dial(addr)
	}
	g.link.SetReadDeadline(time.Unix(1, 0)) // it reads nothing any more
	frame := (&frameBuilder{to: Gateway, protocol: 1, payload: ping(make([]byte, 1400))}).bytes()
	eventually(t, "frames are lost", func() bool {
		_ = g.link.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := g.link.Write(frame); err != nil {
			t.Fatalf("the network does not read: %v", err)
		}
		_ = n.SetEgress(sandbox.Egress{})
		return n.Stats().Lost > 0
	})
	n.link.mu.Lock()
	queued := n.link.queued
	n.link.mu.Unlock()
	if queued > queuedBytes {
		t.Errorf("%d bytes are queued", queued)
	}
	done := make(chan struct{})
	go func() {
		n.Close()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(limit):
		t.Error("it does not close")
	}
}

func TestSYNFloodIsBounded(t *testing.T) {
	release := make(chan struct{})
	host := func(ctx context.Context, _ string, _ netip.AddrPort) (net.Conn, error) {
		select {
		case <-release:
		case <-ctx.Done():
		}
		return nil, syscall.ETIMEDOUT
	}
	n, g := start(t, Config{Dial: host})
	before := runtime.NumGoroutine()
	for i := range 20_000 {
		g.send((&frameBuilder{to: addr4(far), protocol: 6, payload: syn(uint16(i), uint16(1+i%7))}).bytes())
	}
	eventually(t, "all are read", func() bool { return n.Stats().FramesSent >= 20_000 })
	if got := n.Stats().TCPOpen; got != maxHalfOpen {
		t.Errorf("%d are being connected", got)
	}
	if grown := runtime.NumGoroutine() - before; grown > 2*maxHalfOpen+100 {
		t.Errorf("%d more goroutines", grown)
	}
	close(release)
	eventually(t, "room is made", func() bool { return n.Stats().TCPOpen == 0 })
	n.tcp.mu.Lock()
	defer n.tcp.mu.Unlock()
	if len(n.tcp.halfOpen) != 0 {
		t.Errorf("%d are left half open", len(n.tcp.halfOpen))
	}
}

func TestHandshakesThatAreNotFinishedAreEnded(t *testing.T) {
	t.Parallel()
	n, g := start(t, Config{})
	g.stack.RemoveAddress(nic, address(Guest)) // so that no reset answers
	addr := netip.MustParseAddrPort(serveTCP(t, echo))
	for i := range 20 {
		g.send((&frameBuilder{to: addr.Addr(), protocol: 6, payload: syn(uint16(i+1), addr.Port())}).bytes())
		g.send((&frameBuilder{to: Gateway, protocol: 6, payload: syn(uint16(i+1), 53)}).bytes())
	}
	eventually(t, "all are begun", func() bool { return n.Stats().TCPOpen == 40 })
	if err := n.SetEgress(sandbox.Egress{Mode: sandbox.EgressDeny}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the policy ended them", func() bool { return n.Stats().TCPOpen == 20 })
	begun := time.Now()
	n.Close()
	if took := time.Since(begun); took > limit {
		t.Errorf("closing took %s", took)
	}
}

func TestManyConnectionsAtOnceAndOneAfterTheOther(t *testing.T) {
	t.Parallel()
	n, g := start(t, Config{})
	addr := serveTCP(t, echo)
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			conn, err := g.tryDial(addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			data := pattern(10_000)
			_, _ = conn.Write(data)
			got := make([]byte, len(data))
			if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, data) {
				t.Error("not what was sent", err)
			}
		})
	}
	all.Wait()
	for range 100 {
		conn := g.dial(addr)
		_, _ = conn.Write([]byte("x"))
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	eventually(t, "all are closed", func() bool { return n.Stats().TCPOpen == 0 })
	if n.Stats().TCPTotal != 200 {
		t.Errorf("%+v", n.Stats())
	}
}
