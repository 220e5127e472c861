package forward

import (
	"fmt"
	"io"
	"net"
	"runtime"
	"testing"
)

// bench runs a benchmark through a forward and directly; the two are to be
// compared.
func bench(b *testing.B, network string, serve func(net.Conn), run func(b *testing.B, addr string)) {
	addr := server(b, network, serve)
	f := open(b, Config{Backend: leadTo(addr)})
	l := forwarded(b, f, Lease{})
	b.Run("forwarded-to-"+network, func(b *testing.B) { run(b, l.dialAddress()) })
	if network == "tcp" {
		b.Run("direct", func(b *testing.B) { run(b, addr) })
	}
}

// BenchmarkConnect is a new connection, a byte each way, and its end.
func BenchmarkConnect(b *testing.B) {
	for _, network := range []string{"tcp", "unix"} {
		bench(b, network, func(conn net.Conn) {
			buf := make([]byte, 1)
			if _, err := conn.Read(buf); err == nil {
				_, _ = conn.Write(buf)
			}
		}, func(b *testing.B, addr string) {
			buf := make([]byte, 1)
			for b.Loop() {
				conn, err := net.Dial("tcp", addr)
				if err != nil {
					b.Fatal(err)
				}
				_, _ = conn.Write(buf)
				if _, err := io.ReadFull(conn, buf); err != nil {
					b.Fatal(err)
				}
				_ = conn.(*net.TCPConn).SetLinger(0) // else ports run out
				conn.Close()
			}
		})
	}
}

// BenchmarkBulk is what a client can send.
func BenchmarkBulk(b *testing.B) {
	for _, network := range []string{"tcp", "unix"} {
		bench(b, network, func(conn net.Conn) {
			buf := make([]byte, 1<<20)
			for {
				if _, err := conn.Read(buf); err != nil {
					break
				}
			}
			_, _ = conn.Write([]byte("."))
		}, func(b *testing.B, addr string) {
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				b.Fatal(err)
			}
			defer conn.Close()
			chunk := make([]byte, 1<<20)
			b.SetBytes(int64(len(chunk)))
			for b.Loop() {
				if _, err := conn.Write(chunk); err != nil {
					b.Fatal(err)
				}
			}
			_ = conn.(*net.TCPConn).CloseWrite()
			_, _ = io.ReadAll(conn)
		})
	}
}

// BenchmarkRoundTrip is a small message and its answer on an open connection.
func BenchmarkRoundTrip(b *testing.B) {
	bench(b, "tcp", echo, func(b *testing.B, addr string) {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		roundTrips(b, conn)
	})
}

func BenchmarkUDPRoundTrip(b *testing.B) {
	addr := udpServer(b, "echo")
	f := open(b, Config{Backend: leadTo(addr)})
	l := forwarded(b, f, Lease{UDP: true})
	for name, at := range map[string]string{"forwarded": l.dialAddress(), "direct": addr} {
		b.Run(name, func(b *testing.B) {
			conn, err := net.Dial("udp", at)
			if err != nil {
				b.Fatal(err)
			}
			defer conn.Close()
			roundTrips(b, conn)
		})
	}
}

func roundTrips(b *testing.B, conn net.Conn) {
	buf := make([]byte, 200)
	for b.Loop() {
		if _, err := conn.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(conn, buf); err != nil {
			b.Fatal(err)
		}
	}
}

// used is memory of heap and stacks that is in use.
func used() int {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapInuse + m.StackInuse)
}

func BenchmarkIdleForwards(b *testing.B) {
	for _, udp := range []bool{false, true} {
		b.Run(Lease{UDP: udp}.Protocol(), func(b *testing.B) {
			const forwards = 1000
			for b.Loop() {
				f := New(Config{First: 21000, Last: 21999, Backend: leadTo("127.0.0.1:1")})
				before := used()
				for i := range forwards {
					forwarded(b, f, Lease{Sandbox: fmt.Sprint("s", i), UDP: udp})
				}
				b.ReportMetric(float64(used()-before)/forwards, "B/forward")
				_ = f.Close()
			}
		})
	}
}

func BenchmarkIdleConnections(b *testing.B) {
	for b.Loop() {
		b.ReportMetric(float64(perConnection(b, 1000)), "B/connection")
	}
}

// perConnection is what the forwarder needs for a connection that has carried
// something and is idle: what a client and a server need that are connected
// through it, less what they need without it.
func perConnection(t testing.TB, connections int) int {
	addr := server(t, "tcp", echo)
	f := open(t, Config{Backend: leadTo(addr)})
	l := forwarded(t, f, Lease{})
	direct := held(t, addr, connections)
	return (held(t, l.dialAddress(), connections) - direct) / connections
}

// held is the memory that is freed when idle connections to addr are closed.
func held(t testing.TB, addr string, connections int) int {
	before := runtime.NumGoroutine()
	var clients []net.Conn
	data := make([]byte, 100<<10)
	for range connections {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, conn)
		if _, err := conn.Write(data); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, data); err != nil {
			t.Fatal(err)
		}
	}
	with := used()
	for _, conn := range clients {
		conn.Close()
	}
	eventually(t, "all is over", func() bool { return runtime.NumGoroutine() <= before+2 })
	return int(with) - int(used())
}
