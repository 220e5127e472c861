package network

import (
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// The guest of these benchmarks is gVisor, in the same process and on the same
// processors: a real one does better. Each reports its ratio to the same over
// the loopback, taken in the same run.

// throughput carries b.N blocks, and returns the bytes per second.
func throughput(b *testing.B, from io.Writer, to io.Reader) float64 {
	const block = 256 << 10
	size := int64(b.N) * block
	begun := time.Now()
	go func() {
		data := make([]byte, block)
		for range b.N {
			if _, err := from.Write(data); err != nil {
				b.Error(err)
				return
			}
		}
	}()
	if n, err := io.CopyN(io.Discard, to, size); err != nil {
		b.Fatalf("%d of %d: %v", n, size, err)
	}
	return float64(size) / time.Since(begun).Seconds()
}

// accepted returns an address and what comes of a connection to it.
func accepted(b *testing.B) (string, func() *net.TCPConn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	return l.Addr().String(), func() *net.TCPConn {
		conn, err := l.Accept()
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { conn.Close() })
		return conn.(*net.TCPConn)
	}
}

func benchmarkThroughput(b *testing.B, mtu int, toGuest bool) {
	addr, accept := accepted(b)
	direct, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	defer direct.Close()
	plain := throughput(b, direct, accept())
	_, g := start(b, Config{MTU: mtu})
	_, port, _ := net.SplitHostPort(addr)
	conn := g.dial(net.JoinHostPort(far, port))
	_ = conn.SetDeadline(time.Time{})
	host := accept()
	b.ResetTimer()
	var rate float64
	if toGuest {
		rate = throughput(b, host, conn)
	} else {
		rate = throughput(b, conn, host)
	}
	b.ReportMetric(rate/1e6, "MB/s")
	b.ReportMetric(rate/plain, "of-loopback")
}

func BenchmarkToHost1500(b *testing.B)   { benchmarkThroughput(b, 1500, false) }
func BenchmarkToHost65000(b *testing.B)  { benchmarkThroughput(b, maxMTU, false) }
func BenchmarkToGuest1500(b *testing.B)  { benchmarkThroughput(b, 1500, true) }
func BenchmarkToGuest65000(b *testing.B) { benchmarkThroughput(b, maxMTU, true) }

// BenchmarkFramesFromGuest is the network's part alone: nobody computes at the
// other end of the link.
func BenchmarkFramesFromGuest(b *testing.B) {
	n, g := start(b, Config{})
	frame := (&frameBuilder{to: Gateway, protocol: 132, payload: make([]byte, DefaultMTU-header.IPv4MinimumSize)}).bytes()
	b.SetBytes(int64(len(frame)))
	before := n.Stats().FramesSent
	b.ResetTimer()
	for range b.N {
		g.send(frame)
	}
	for n.Stats().FramesSent < before+uint64(b.N) {
		runtime.Gosched()
	}
}

func BenchmarkConnect(b *testing.B) {
	addr, accept := accepted(b)
	_, port, _ := net.SplitHostPort(addr)
	_, g := start(b, Config{})
	measure := func(dial func() net.Conn) time.Duration {
		begun := time.Now()
		for range b.N {
			conn := dial()
			accept().Close()
			conn.Close()
		}
		return time.Since(begun)
	}
	plain := measure(func() net.Conn {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		return conn
	})
	b.ResetTimer()
	through := measure(func() net.Conn { return g.dial(net.JoinHostPort(far, port)) })
	b.ReportMetric(float64(through)/float64(plain), "of-loopback")
}

// BenchmarkIdle reports the memory of a network that does nothing.
func BenchmarkIdle(b *testing.B) {
	const many = 16
	for range b.N {
		before, stacks := heap(), runtime.NumGoroutine()
		var all []*Network
		for range many {
			ours, theirs, err := Pair()
			if err != nil {
				b.Fatal(err)
			}
			defer theirs.Close()
			all = append(all, must(Open(Config{Link: ours, MAC: guestMAC})))
		}
		b.ReportMetric(float64(heap()-before)/many/1024, "KiB")
		b.ReportMetric(float64(runtime.NumGoroutine()-stacks)/many, "goroutines")
		for _, n := range all {
			n.Close()
		}
	}
}
