//go:build linux

package reach

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

// channel returns both ends of a guest channel, which end with the test.
func channel(t testing.TB) (agent, guest *wire.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*wire.Conn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "channel")
		conn, err := net.FileConn(file)
		file.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = wire.New(conn, wire.MaxFrame)
		t.Cleanup(func() { conn.Close() })
	}
	_ = ends[0].NetConn().SetDeadline(time.Now().Add(30 * time.Second))
	return ends[0], ends[1]
}

// call runs one call of the service, as guestd does: errors become answers. It
// has ended when the test has.
func call(t testing.TB, guest *wire.Conn, serve func(ctx context.Context) error) (end func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		err := serve(ctx)
		if failed, ok := errors.AsType[*wire.FailureError](err); ok {
			_ = guest.Send(&guestv1.Response{Failure: failed.Failure})
		}
		done <- err
		guest.Close()
	}()
	wait := func() error {
		cancel()
		err := <-done
		done <- err
		return err
	}
	t.Cleanup(func() { _ = wait() })
	return wait
}

func receive[M proto.Message](t testing.TB, conn *wire.Conn, m M) M {
	t.Helper()
	if err := conn.ReceiveMessage(m); err != nil {
		t.Fatalf("receive %T: %v", m, err)
	}
	return m
}

func answered(t testing.TB, conn *wire.Conn) {
	t.Helper()
	if response := receive(t, conn, &guestv1.Response{}); response.GetFailure() != nil || response.GetProtocol() != wire.Protocol {
		t.Fatalf("answer %v", response)
	}
}

// serve accepts connections at an address, each handled on its own, until the
// test ends.
func serve(t testing.TB, address string, handle func(*net.TCPConn)) (port uint32) {
	t.Helper()
	listener, err := net.Listen("tcp"+version(address), address)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				handle(conn.(*net.TCPConn))
			}()
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		<-done
	})
	return portOf(listener.Addr())
}

// version keeps net from taking 0.0.0.0 for every address there is.
func version(address string) string {
	if strings.HasPrefix(address, "0.0.0.0") {
		return "4"
	}
	return ""
}

func portOf(address net.Addr) uint32 {
	_, text, _ := net.SplitHostPort(address.String())
	port, _ := strconv.ParseUint(text, 10, 16)
	return uint32(port)
}

// echo sends back all that it was sent once it was sent all of it.
func echo(conn *net.TCPConn) {
	sent, _ := io.ReadAll(conn)
	_, _ = conn.Write(sent)
}

// freePort is one on which nothing listens.
func freePort(t testing.TB) uint32 {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return portOf(listener.Addr())
}

// otherAddress is one of this machine's that is not loopback.
func otherAddress(t testing.TB) string {
	t.Helper()
	for _, address := range ownAddresses() {
		if address.Is4() {
			return address.String()
		}
	}
	return "127.0.0.2" // does as well for all but the search
}

func connectPassed(t testing.TB, s *Service, request *guestv1.Connect) (net.Conn, error) {
	t.Helper()
	agent, guest := channel(t)
	request.PassDescriptor = true
	end := call(t, guest, func(ctx context.Context) error { return s.Connect(ctx, guest, request) })
	var response guestv1.Response
	fds, err := agent.ReceiveDescriptors(&response, 1)
	if err := end(); err != nil {
		return nil, err
	}
	if err != nil || len(fds) != 1 || response.GetFailure() != nil {
		t.Fatalf("received %v, %v, %v", &response, fds, err)
	}
	file := os.NewFile(uintptr(fds[0]), "passed")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	return conn, nil
}

func TestConnectPassesConnection(t *testing.T) {
	t.Parallel()
	for _, address := range []string{"127.0.0.1", "::1", "::", otherAddress(t)} {
		t.Run(address, func(t *testing.T) {
			t.Parallel()
			if address == "127.0.0.2" {
				t.Log("this machine has no address but loopback ones; the search for one is not tried")
				address = "127.0.0.1"
			}
			port := serve(t, net.JoinHostPort(address, "0"), echo)
			conn, err := connectPassed(t, New(nil), &guestv1.Connect{Port: port})
			if err != nil {
				t.Fatal(err)
			}
			tcp, ok := conn.(*net.TCPConn)
			if !ok {
				t.Fatalf("was passed a %T", conn)
			}
			if _, err := tcp.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			if err := tcp.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(tcp); string(got) != "hello" || err != nil {
				t.Errorf("echo is %q, %v", got, err)
			}
		})
	}
}

func TestConnectIsRefused(t *testing.T) {
	t.Parallel()
	for _, udp := range []bool{false, true} {
		_, err := connectPassed(t, New(nil), &guestv1.Connect{Port: freePort(t), Udp: udp})
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("udp %v: %v", udp, err)
		}
	}
	for _, port := range []uint32{0, 65536, 1 << 31} {
		_, err := connectPassed(t, New(nil), &guestv1.Connect{Port: port})
		failed, ok := errors.AsType[*wire.FailureError](err)
		if !ok || failed.Failure.GetCode() != guestv1.Failure_CODE_INVALID {
			t.Errorf("port %d: %v", port, err)
		}
	}
}

func TestLendSocketsPassesFreshOnes(t *testing.T) {
	t.Parallel()
	for count, want := range map[uint32]int{1: 1, wire.MaxDescriptors: wire.MaxDescriptors} {
		agent, guest := channel(t)
		end := call(t, guest, func(ctx context.Context) error {
			return New(nil).LendSockets(ctx, guest, &guestv1.LendSockets{Count: count})
		})
		var response guestv1.Response
		fds, err := agent.ReceiveDescriptors(&response, wire.MaxDescriptors)
		if err := errors.Join(err, end()); err != nil {
			t.Fatal(err)
		}
		if len(fds) != want {
			t.Errorf("%d were lent, want %d", len(fds), want)
		}
		for _, fd := range fds {
			if _, err := unix.Getpeername(fd); !errors.Is(err, unix.ENOTCONN) {
				t.Errorf("one that was lent: %v, want that it is not connected", err)
			}
			_ = unix.Close(fd)
		}
	}
}

func TestLendSocketsRefuses(t *testing.T) {
	t.Parallel()
	for _, count := range []uint32{0, wire.MaxDescriptors + 1, 1 << 31} {
		_, guest := channel(t)
		err := New(nil).LendSockets(t.Context(), guest, &guestv1.LendSockets{Count: count})
		failed, ok := errors.AsType[*wire.FailureError](err)
		if !ok || failed.Failure.GetCode() != guestv1.Failure_CODE_INVALID {
			t.Errorf("%d: %v", count, err)
		}
	}
	one, two := net.Pipe()
	defer one.Close()
	defer two.Close()
	err := New(nil).LendSockets(t.Context(), wire.New(one, 100), &guestv1.LendSockets{Count: 1})
	failed, ok := errors.AsType[*wire.FailureError](err)
	if !ok || failed.Failure.GetCode() != guestv1.Failure_CODE_UNIMPLEMENTED {
		t.Errorf("%v, want that it cannot", err)
	}
}

func TestConnectPassesNothingOverOtherChannels(t *testing.T) {
	t.Parallel()
	one, other := net.Pipe()
	defer one.Close()
	defer other.Close()
	err := New(nil).Connect(t.Context(), wire.New(one, 100), &guestv1.Connect{Port: 1, PassDescriptor: true})
	failed, ok := errors.AsType[*wire.FailureError](err)
	if !ok || failed.Failure.GetCode() != guestv1.Failure_CODE_UNIMPLEMENTED {
		t.Errorf("%v", err)
	}
}

// relay begins a Connect without a descriptor and returns the agent's end of it.
func relay(t testing.TB, request *guestv1.Connect) (conn *net.UnixConn, end func() error) {
	t.Helper()
	agent, guest := channel(t)
	s := New(nil)
	end = call(t, guest, func(ctx context.Context) error { return s.Connect(ctx, guest, request) })
	answered(t, agent)
	return agent.NetConn().(*net.UnixConn), end
}

func TestRelayCarriesHalfClose(t *testing.T) {
	t.Parallel()
	conn, _ := relay(t, &guestv1.Connect{Port: serve(t, "127.0.0.1:0", echo)})
	sent := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	if _, err := conn.Write(sent); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); !bytes.Equal(got, sent) || err != nil {
		t.Errorf("%d bytes of %d came back, %v", len(got), len(sent), err)
	}
}

func TestRelayCarriesHalfCloseOfService(t *testing.T) {
	t.Parallel()
	got := make(chan string, 1)
	conn, end := relay(t, &guestv1.Connect{Port: serve(t, "127.0.0.1:0", func(service *net.TCPConn) {
		_, _ = service.Write([]byte("first"))
		_ = service.CloseWrite()
		rest, _ := io.ReadAll(service)
		got <- string(rest)
	})})
	if first, err := io.ReadAll(conn); string(first) != "first" || err != nil {
		t.Fatalf("%q, %v", first, err)
	}
	if _, err := conn.Write([]byte("second")); err != nil {
		t.Fatal(err)
	}
	conn.CloseWrite()
	if rest := <-got; rest != "second" {
		t.Errorf("the service got %q", rest)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}

func TestRelayEndsWithReset(t *testing.T) {
	t.Parallel()
	conn, _ := relay(t, &guestv1.Connect{Port: serve(t, "127.0.0.1:0", func(service *net.TCPConn) {
		_, _ = io.ReadFull(service, make([]byte, 1))
		_ = service.SetLinger(0)
	})})
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, conn); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if _, err := conn.Write([]byte("x")); err == nil {
		t.Error("the channel is still open to write to")
	}
}

func TestRelayResetsServiceWhenItEnds(t *testing.T) {
	t.Parallel()
	got, begun := make(chan error, 1), make(chan struct{})
	conn, end := relay(t, &guestv1.Connect{Port: serve(t, "127.0.0.1:0", func(service *net.TCPConn) {
		_, _ = io.ReadFull(service, make([]byte, 1))
		close(begun)
		_, err := service.Read(make([]byte, 1))
		got <- err
	})})
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	<-begun
	if err := end(); err != nil {
		t.Error(err)
	}
	if err := <-got; err == nil {
		t.Error("the service was not told")
	}
}

func udpEcho(t testing.TB, address string) (port uint32) {
	t.Helper()
	conn, err := net.ListenPacket("udp"+version(address), address)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buffer := make([]byte, bufferSize)
		for {
			n, from, err := conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(buffer[:n], from)
		}
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
	})
	return portOf(conn.LocalAddr())
}

func TestConnectPassesDatagrams(t *testing.T) {
	t.Parallel()
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", "[::]:0", "0.0.0.0:0", net.JoinHostPort(otherAddress(t), "0")} {
		conn, err := connectPassed(t, New(nil), &guestv1.Connect{Port: udpEcho(t, address), Udp: true})
		if err != nil {
			t.Errorf("%s: %v", address, err)
			continue
		}
		buffer := make([]byte, 10)
		if _, err := conn.Write([]byte("ping")); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(buffer); string(buffer[:n]) != "ping" || err != nil {
			t.Errorf("%s: %q, %v", address, buffer[:n], err)
		}
	}
}

func TestRelayFramesDatagrams(t *testing.T) {
	t.Parallel()
	conn, _ := relay(t, &guestv1.Connect{Port: udpEcho(t, "127.0.0.1:0"), Udp: true})
	for _, size := range []int{3, 0, maxDatagram} {
		frame := append([]byte{byte(size >> 8), byte(size)}, bytes.Repeat([]byte("x"), size)...)
		if _, err := conn.Write(frame); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(frame))
		if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, frame) {
			t.Fatalf("size %d: %v", size, err)
		}
	}
	// A datagram that UDP cannot carry ends it.
	_, _ = conn.Write(append([]byte{0xff, 0xff}, make([]byte, 0xffff)...))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
}

func BenchmarkConnect(b *testing.B) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	s := New(nil)
	agent, guest := channel(b)
	request := &guestv1.Connect{Port: portOf(listener.Addr()), PassDescriptor: true}
	_ = agent.NetConn().SetDeadline(time.Time{})
	for b.Loop() {
		if err := s.Connect(b.Context(), guest, request); err != nil {
			b.Fatal(err)
		}
		fds, err := agent.ReceiveDescriptors(&guestv1.Response{}, 1)
		if err != nil {
			b.Fatal(err)
		}
		_ = unix.Close(fds[0])
	}
}
