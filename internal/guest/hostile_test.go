package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/sandbox"
)

// hostile is a guest that does with each connection what it likes.
func hostile(t testing.TB, serve func(conn *net.UnixConn)) *Guest {
	t.Helper()
	dir, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		listener.Close()
		os.RemoveAll(dir)
	})
	go func() {
		for {
			conn, err := listener.AcceptUnix()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				serve(conn)
			}()
		}
	}()
	return New("web", func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "s"))
	})
}

// asked waits for the request, so that closing does not cut it off.
func asked(conn net.Conn) {
	var request guestv1.Request
	_ = wire.New(conn, wire.MaxFrame).ReceiveMessage(&request)
}

// calls are one of each kind.
func calls(g *Guest) map[string]func(ctx context.Context) error {
	return map[string]func(ctx context.Context) error{
		"Hello":     func(ctx context.Context) error { _, err := g.Hello(ctx); return err },
		"Configure": func(ctx context.Context) error { return g.Configure(ctx, Configuration{}) },
		"UpdateSecrets": func(ctx context.Context) error {
			_, err := g.UpdateSecrets(ctx, []Secret{{Name: "A", Value: []byte("v")}}, 0, false)
			return err
		},
		"AwaitReady": func(ctx context.Context) error {
			return g.AwaitReady(ctx, sandbox.Readiness{TCPPort: 80}, func(string) {})
		},
		"WatchPorts": func(ctx context.Context) error { return g.WatchPorts(ctx, ctx, func([]Listener) {}) },
		"WatchStats": func(ctx context.Context) error {
			return g.WatchStats(ctx, time.Second, func(*guestv1.Stats) error { return nil })
		},
		"WatchFiles": func(ctx context.Context) error {
			return g.WatchFiles(ctx, "/", true, func([]*guestv1.FileChange, bool) error { return nil })
		},
		"Stat":  func(ctx context.Context) error { _, err := g.Stat(ctx, "/a"); return err },
		"List":  func(ctx context.Context) error { _, _, err := g.List(ctx, "/", "", 10); return err },
		"Execs": func(ctx context.Context) error { _, err := g.Execs(ctx); return err },
		"Read": func(ctx context.Context) error {
			d, err := g.Read(ctx, "/a", 0, 0)
			if err != nil {
				return err
			}
			defer d.Close()
			_, err = io.Copy(io.Discard, d)
			return err
		},
		"Write": func(ctx context.Context) error {
			u, err := g.Write(ctx, "/a", nil, false)
			if err != nil {
				return err
			}
			defer u.Close()
			if _, err := u.Write(make([]byte, 1<<20)); err != nil {
				return err
			}
			_, _, err = u.Finish()
			return err
		},
		"Exec": func(ctx context.Context) error {
			x, err := g.Exec(ctx, Command{Args: []string{"true"}})
			if err != nil {
				return err
			}
			defer x.Close()
			for {
				out, err := x.Receive()
				if err != nil || out.Exit != nil {
					return err
				}
			}
		},
		"LendSockets": func(ctx context.Context) error {
			lent, err := g.LendSockets(ctx, MaxSockets)
			closeSockets(lent)
			return err
		},
		"Connect": func(ctx context.Context) error {
			conn, err := g.Connect(ctx, 80, false)
			if err == nil {
				conn.Close()
			}
			return err
		},
	}
}

func TestSilentGuestCostsNoMoreThanTheCallersPatience(t *testing.T) {
	t.Parallel()
	g := hostile(t, func(conn *net.UnixConn) { _, _ = io.Copy(io.Discard, conn) })
	for name, call := range calls(g) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if err := call(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v, want that the deadline passed", err)
			}
		})
	}
}

func TestGuestThatHangsUpOrLiesIsToldApart(t *testing.T) {
	t.Parallel()
	huge := binary.BigEndian.AppendUint32(nil, 1<<31)
	for name, answer := range map[string][]byte{
		"nothing":           nil,
		"half a header":     {0, 0},
		"a frame too long":  append(huge, 0),
		"an unknown kind":   {0, 0, 0, 1, 9, 0},
		"no message":        {0, 0, 0, 3, 0, 0xff, 0xff, 0xff},
		"half a frame":      {0, 0, 0, 9, 0, 1},
		"bytes, no message": {0, 0, 0, 1, 1, 1},
	} {
		g := hostile(t, func(conn *net.UnixConn) {
			asked(conn)
			_, _ = conn.Write(answer)
		})
		for call, do := range calls(g) {
			t.Run(name+"/"+call, func(t *testing.T) {
				t.Parallel()
				if err := do(t.Context()); !errors.Is(err, sandbox.ErrGuest) {
					t.Errorf("%v, want one that wraps ErrGuest", err)
				}
			})
		}
	}
}

func TestFloodOfAGuestIsBounded(t *testing.T) {
	t.Parallel()
	// As large as is taken, again and again, in what is an answer to all.
	response, err := proto.Marshal(&guestv1.Response{Result: &guestv1.Response_File{File: &guestv1.FileInfo{
		Name: strings.Repeat("x", wire.MaxFromGuest-100),
	}}})
	if err != nil {
		t.Fatal(err)
	}
	frame := binary.BigEndian.AppendUint32(nil, uint32(len(response)))
	frame = append(append(frame, 0), response...)
	g := hostile(t, func(conn *net.UnixConn) {
		for {
			if _, err := conn.Write(frame); err != nil {
				return
			}
		}
	})
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for name, call := range calls(g) {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		if err := call(ctx); err == nil && name != "Configure" && name != "UpdateSecrets" && name != "List" && name != "Stat" && name != "Execs" {
			t.Errorf("%s took a flood for an answer", name)
		}
		cancel()
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapInuse) - int64(before.HeapInuse); grown > 32<<20 {
		t.Errorf("%d MiB are held after it", grown>>20)
	}
}

// lies are descriptors of other things than a guest was asked for.
func lies(t *testing.T) map[string][]int {
	t.Helper()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tcp.Close() })
	udp, err := net.Dial("udp", "127.0.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { udp.Close() })
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(pair[0])
		unix.Close(pair[1])
		file.Close()
	})
	return map[string][]int{
		"a file": {int(file.Fd())}, "a unix socket": {pair[0]}, "a listening socket": {number(t, tcp.(*net.TCPListener))},
		"a UDP socket": {number(t, udp.(*net.UDPConn))}, "nothing": nil, "two, the first wrong": {pair[0], number(t, udp.(*net.UDPConn))},
	}
}

// number is the descriptor of c, which stays c's.
func number(t *testing.T, c syscall.Conn) (fd int) {
	t.Helper()
	control, err := c.SyscallConn()
	if err == nil {
		err = control.Control(func(f uintptr) { fd = int(f) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// passing is a guest that answers everything with these descriptors.
func passing(t *testing.T, response *guestv1.Response, fds ...int) *Guest {
	t.Helper()
	payload, err := proto.Marshal(response)
	if err != nil {
		t.Fatal(err)
	}
	frame := append(binary.BigEndian.AppendUint32(nil, uint32(len(payload))), 0)
	return hostile(t, func(conn *net.UnixConn) {
		asked(conn)
		_, _, _ = conn.WriteMsgUnix(append(frame, payload...), unix.UnixRights(fds...), nil)
	})
}

// noneLeft fails the test if each of 20 calls leaves a descriptor open.
func noneLeft(t *testing.T, name string, call func()) {
	t.Helper()
	before := openFiles(t)
	for range 20 {
		call()
	}
	// Other tests open and close some meanwhile.
	if grown := openFiles(t) - before; grown > 15 {
		t.Errorf("%s: %d more descriptors are open", name, grown)
	}
}

func TestOnlyTheConnectionThatWasAskedForIsAdopted(t *testing.T) {
	t.Parallel()
	for name, fds := range lies(t) {
		g := passing(t, &guestv1.Response{}, fds...)
		noneLeft(t, name, func() {
			if conn, err := g.Connect(t.Context(), 80, false); err == nil || !errors.Is(err, sandbox.ErrGuest) {
				t.Errorf("%s: %v, %v", name, conn, err)
			}
		})
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestTextFromInsideCannotSteerATerminal(t *testing.T) {
	t.Parallel()
	g := hostile(t, func(conn *net.UnixConn) {
		asked(conn)
		_ = wire.New(conn, wire.MaxFrame).Send(&guestv1.Response{Failure: &guestv1.Failure{
			Code: guestv1.Failure_CODE_DENIED, Message: "\x1b]0;owned\a\u202eno\n" + strings.Repeat("é", 1<<12),
		}})
	})
	_, err := g.Hello(t.Context())
	if !errors.Is(err, sandbox.ErrDenied) || strings.ContainsAny(err.Error(), "\x1b\a\n\u202e") || len(err.Error()) > 2*maxText {
		t.Errorf("%q", err)
	}
}

func TestOlderGuestIsNamedWhereItCannot(t *testing.T) {
	t.Parallel()
	g := hostile(t, func(conn *net.UnixConn) {
		asked(conn)
		_ = wire.New(conn, wire.MaxFrame).Send(&guestv1.Response{
			Protocol: 0, Failure: &guestv1.Failure{Code: guestv1.Failure_CODE_UNIMPLEMENTED, Message: "no such call"},
		})
	})
	_, err := g.Stat(t.Context(), "/")
	if !errors.Is(err, sandbox.ErrUnsupported) || !strings.Contains(err.Error(), "restart") {
		t.Errorf("%v; want one that says what helps", err)
	}
}

// FuzzGuest answers every kind of call with any bytes.
func FuzzGuest(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 0})
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 'h', 'i', 0, 0, 0, 0, 1})
	f.Add([]byte{0, 0, 0, 4, 0, 0x1a, 2, 8, 1})
	f.Fuzz(func(t *testing.T, answer []byte) {
		for name := range calls(nil) {
			agent, inside := net.Pipe()
			g := New("web", func(context.Context) (net.Conn, error) { return agent, nil })
			go func() {
				defer inside.Close()
				go func() { _, _ = io.Copy(io.Discard, inside) }()
				_, _ = inside.Write(answer)
			}()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			_ = calls(g)[name](ctx)
			if ctx.Err() != nil {
				t.Errorf("%s hangs", name)
			}
			cancel()
		}
	})
}
