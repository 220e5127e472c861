package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestBoundsOnConnectionsHold(t *testing.T) {
	t.Parallel()
	addr := server(t, "tcp", echo)
	f := open(t, Config{Backend: leadTo(addr), MaxConnections: 3})
	l, other := forwarded(t, f, Lease{}), forwarded(t, f, Lease{Sandbox: "other"})
	var conns []net.Conn
	works := func(l Lease) bool {
		conn, err := net.Dial("tcp", l.dialAddress())
		if err == nil {
			t.Cleanup(func() { conn.Close() })
			conns = append(conns, conn)
			// A reset is told once: to the write if it came before that.
			if _, err = conn.Write([]byte("x")); err == nil {
				_, err = io.ReadFull(conn, make([]byte, 1))
			}
		}
		if err != nil && !isReset(err) {
			t.Fatal(err)
		}
		return err == nil
	}
	var got []bool
	for range 5 {
		got = append(got, works(l))
	}
	if fmt.Sprint(got) != "[true true true false false]" {
		t.Errorf("worked: %v", got)
	}
	if !works(other) {
		t.Error("another sandbox is harmed")
	}
	conns[0].Close()
	eventually(t, "there is room again", func() bool { return works(l) })
	if s := f.Leases("web")[0]; s.Refused < 2 {
		t.Errorf("refused: %+v", s)
	}
}

func TestBoundOnPendingHoldsAndAcceptGoesOn(t *testing.T) {
	t.Parallel()
	addr := server(t, "tcp", echo)
	ready := make(chan struct{})
	f := open(t, Config{MaxPending: 4, Backend: &guests{connect: func(ctx context.Context, s string, port uint16, udp bool) (net.Conn, uint64, error) {
		select {
		case <-ready:
			return leadTo(addr).connect(ctx, s, port, udp)
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}}})
	l := forwarded(t, f, Lease{})
	var conns []net.Conn
	for range 9 {
		conn, err := net.Dial("tcp", l.dialAddress())
		if err != nil {
			continue // reset already
		}
		t.Cleanup(func() { conn.Close() })
		_, _ = conn.Write([]byte("early data"))
		conns = append(conns, conn)
	}
	eventually(t, "4 wait and 5 are refused", func() bool { s := f.Leases("web")[0]; return s.Pending == 4 && s.Refused == 5 })
	close(ready)
	served := 0
	for _, conn := range conns {
		if _, err := io.ReadFull(conn, make([]byte, 10)); err == nil {
			served++
		}
	}
	if served != 4 {
		t.Errorf("%d were served", served)
	}
}

// TestClientThatLeavesIsNoticedWhileItWaits: by a reset, by a close with and
// without early data, and after a half-close; while one that half-closed and
// waits on is served.
func TestClientThatLeavesIsNoticedWhileItWaits(t *testing.T) {
	t.Parallel()
	for name, leave := range map[string]func(*net.TCPConn){
		"close": func(c *net.TCPConn) { c.Close() },
		"reset": func(c *net.TCPConn) {
			_ = c.SetLinger(0)
			c.Close()
		},
		"close after data": func(c *net.TCPConn) {
			_, _ = c.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
			c.Close()
		},
		"half-close, then close": func(c *net.TCPConn) {
			_, _ = c.Write([]byte("GET /"))
			_ = c.CloseWrite()
			c.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ended := make(chan error, 1)
			f := open(t, Config{Backend: &guests{connect: func(ctx context.Context, _ string, _ uint16, _ bool) (net.Conn, uint64, error) {
				<-ctx.Done()
				ended <- context.Cause(ctx)
				return nil, 0, ctx.Err()
			}}})
			f.patience = 5 * time.Millisecond
			conn := dial(t, forwarded(t, f, Lease{}))
			eventually(t, "it waits", func() bool { return f.Leases("web")[0].Pending == 1 })
			leave(conn)
			select {
			case err := <-ended:
				if !errors.Is(err, errLeft) {
					t.Errorf("the wait ended with %v", err)
				}
			case <-time.After(10 * time.Second):
				t.Error("it was not noticed")
			}
		})
	}
}

func TestHalfClosedClientIsServedAfterTheBoot(t *testing.T) {
	t.Parallel()
	addr := server(t, "tcp", func(conn net.Conn) {
		all, _ := io.ReadAll(conn)
		_, _ = conn.Write(append([]byte("got "), all...))
	})
	ready := make(chan struct{})
	f := open(t, Config{Backend: &guests{connect: func(ctx context.Context, s string, port uint16, udp bool) (net.Conn, uint64, error) {
		select {
		case <-ready:
			return leadTo(addr).connect(ctx, s, port, udp)
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}}})
	f.patience = time.Millisecond
	conn := dial(t, forwarded(t, f, Lease{}))
	_, _ = conn.Write([]byte("early"))
	_ = conn.CloseWrite()
	eventually(t, "it waits", func() bool { return f.Leases("web")[0].Pending == 1 })
	time.Sleep(50 * time.Millisecond) // many looks at a client that is still there
	close(ready)
	if got, err := io.ReadAll(conn); err != nil || string(got) != "got early" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestAcceptRecoversFromAShortageOfDescriptors(t *testing.T) {
	if child("shortage") {
		shortage(t)
		return
	}
	t.Parallel()
	runChild(t, "shortage")
}

// shortage runs in a process of its own, for the limit is the process's.
func shortage(t *testing.T) {
	f := open(t, Config{Backend: leadTo(server(t, "tcp", echo))})
	l := forwarded(t, f, Lease{})
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	conn := dial(t, l) // the client's descriptor is there; more are not
	_, _ = conn.Write([]byte("x"))
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	var held []int
	waiting, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(waiting)
	short := unix.Rlimit{Cur: 64, Max: limit.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &short); err != nil {
		t.Fatal(err)
	}
	for {
		fd, err := unix.Dup(0)
		if err != nil {
			break
		}
		held = append(held, fd)
	}
	if err := unix.Connect(waiting, &unix.SockaddrInet4{Port: int(l.HostPort), Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "accept fails", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return !f.leases[key{false, l.HostPort}].lastWarn.IsZero()
	})
	for _, fd := range held {
		unix.Close(fd)
	}
	if _, err := unix.Write(waiting, []byte("y")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1)
	if n, err := unix.Read(waiting, buf); n != 1 || err != nil || buf[0] != 'y' {
		t.Errorf("%q, %v", buf[:n], err)
	}
}

func TestNothingIsLeftOpenAfterClose(t *testing.T) {
	// Not parallel: it counts the process's goroutines and descriptors.
	addr, backend := server(t, "tcp", echo), &guests{}
	backend.connect = leadTo(addr).connect
	udpAddr := udpServer(t, "echo")
	descriptors := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skip("no /proc here")
		}
		return len(entries)
	}
	goroutines, files := runtime.NumGoroutine(), descriptors()
	udp := leadTo(udpAddr).connect
	backend.connect = func(ctx context.Context, s string, port uint16, isUDP bool) (net.Conn, uint64, error) {
		if isUDP {
			return udp(ctx, s, port, true)
		}
		return leadTo(addr).connect(ctx, s, port, false)
	}
	first, last := ranges()
	f := New(Config{Backend: backend, First: first, Last: last})
	l, u := forwarded(t, f, Lease{}), forwarded(t, f, Lease{UDP: true})
	var conns []net.Conn
	for range 30 {
		conn, err := net.Dial("tcp", l.dialAddress())
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
		go func() { _, _ = conn.Write(make([]byte, 300<<10)) }()
		if _, err := io.ReadFull(conn, make([]byte, 300<<10)); err != nil {
			t.Fatal(err)
		}
		client, err := net.Dial("udp", u.dialAddress())
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, client)
		exchange(t, client, "x")
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for _, conn := range conns {
		conn.Close()
	}
	eventually(t, fmt.Sprintf("%d goroutines and %d descriptors, as before", goroutines, files), func() bool {
		return runtime.NumGoroutine() <= goroutines && descriptors() <= files
	})
}

func TestIdleConnectionsNeedLittleMemory(t *testing.T) {
	if child("memory") {
		if each := perConnection(t, 1000); each > 16<<10 {
			t.Errorf("%d bytes of heap and stack each", each)
		}
		return
	}
	t.Parallel()
	runChild(t, "memory")
}
