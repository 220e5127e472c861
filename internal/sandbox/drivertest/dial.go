package drivertest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

func dialTests() []test {
	return []test{
		{"DialEchoes", dialEchoes},
		{"DialOutlivesContextAndDriver", dialOutlivesContext},
		{"DialManyAtOnce", dialManyAtOnce},
		{"DialWhereNobodyListens", dialNobody},
		{"DialOfWhatDoesNotRun", dialOfNotRunning},
		{"DialAfterRestart", dialAfterRestart},
		{"DialOfWedgedGuest", dialWedged},
	}
}

// guestPort is where the guest listens, and nobody on the next.
const guestPort = 7000

// guest makes and starts a sandbox that listens on its guest channel.
func (b *box) guest(workload string) {
	b.t.Helper()
	b.create(workload, b.s.GuestDir, strconv.Itoa(guestPort))
	b.start()
}

// dialled waits until the guest of a sandbox listens. A driver is to give an
// error at once until then.
func (b *box) dialled() net.Conn {
	b.t.Helper()
	var conn net.Conn
	var last error
	b.s.eventually(b.t, "Dial succeeds", func() bool {
		conn, last = b.dial(b.t.Context(), guestPort)
		if last != nil {
			b.want(sandbox.StateRunning)
		}
		return last == nil
	})
	b.t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(b.s.Patience)); err != nil {
		b.t.Fatalf("SetDeadline: %v", err)
	}
	return conn
}

// dial makes one attempt, which is not to take long.
func (b *box) dial(ctx context.Context, port uint32) (net.Conn, error) {
	b.t.Helper()
	a := step(b.t, b.s, ctx, "Dial", func(ctx context.Context, d sandbox.Driver) (net.Conn, error) {
		return d.Dial(ctx, b.ref, port)
	})
	if a.took > b.s.soon {
		b.t.Errorf("Dial took %s, and then returned %v", a.took, a.err)
	}
	if a.err == nil && a.value == nil {
		b.t.Fatal("Dial returned neither a connection nor an error")
	}
	return a.value, a.err
}

// wantNoDial wants Dial to fail at once.
func (b *box) wantNoDial() {
	b.t.Helper()
	for _, port := range []uint32{guestPort, guestPort + 1, 1<<32 - 1} {
		if conn, err := b.dial(context.WithoutCancel(b.t.Context()), port); err == nil {
			conn.Close()
			b.t.Errorf("Dial of port %d succeeded, where there is nobody; it is %+v", port, b.inspect())
		}
	}
}

// echoed sends data and wants it back.
func echoed(conn net.Conn, data []byte) error {
	sent := async(func() (int, error) { return conn.Write(data) })
	got := make([]byte, len(data))
	if _, err := io.ReadFull(conn, got); err != nil {
		return fmt.Errorf("read the echo: %w", err)
	}
	if a := <-sent; a.err != nil {
		return fmt.Errorf("write: %w", a.err)
	}
	if !bytes.Equal(got, data) {
		return errors.New("what came back is not what was sent")
	}
	return nil
}

func dialEchoes(t *testing.T, s *suite) {
	b := s.box(t)
	b.guest("guest-echo")
	conn := b.dialled()
	data := make([]byte, 1<<20)
	_, _ = rand.Read(data)
	for _, size := range []int{1, 100, len(data)} {
		if err := echoed(conn, data[:size]); err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	// Another connection is another stream, and closing one leaves the other.
	second := b.dialled()
	if err := conn.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := echoed(second, data[:100]); err != nil {
		t.Error(err)
	}
	b.stop(0)
	if n, err := second.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read from a sandbox that was stopped: %d, %v; want the end or an error", n, err)
	}
}

func dialOutlivesContext(t *testing.T, s *suite) {
	b := s.box(t)
	b.guest("guest-echo")
	b.dialled()
	ctx, cancel := context.WithCancel(t.Context())
	conn, err := b.dial(ctx, guestPort) // on a driver that is closed after it
	cancel()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(s.Patience)); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if err := echoed(conn, []byte("after the end of the context")); err != nil {
			t.Fatal(err)
		}
	}
}

func dialManyAtOnce(t *testing.T, s *suite) {
	b := s.box(t)
	b.guest("guest-echo")
	b.dialled()
	errs := s.atOnce(t, 20, "Dial", func(ctx context.Context, d sandbox.Driver, i int) error {
		conn, err := d.Dial(ctx, b.ref, guestPort)
		if err != nil {
			return err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(s.Patience)); err != nil {
			return err
		}
		return echoed(conn, fmt.Appendf(nil, "%0*d", 1+1000*i, i))
	})
	for _, err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
}

func dialNobody(t *testing.T, s *suite) {
	b := s.box(t)
	b.sleeper()
	b.wantNoDial() // a guest that never listens

	b = s.box(t)
	b.guest("guest-echo")
	b.dialled()
	if conn, err := b.dial(t.Context(), guestPort+1); err == nil {
		conn.Close()
		t.Error("Dial of a port where nobody listens succeeded")
	}
}

func dialOfNotRunning(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("guest-echo", s.GuestDir, strconv.Itoa(guestPort))
	b.wantNoDial() // created
	b.start()
	b.dialled()
	b.stop(0) // so that it has no time to tidy up
	b.wantNoDial()
}

func dialAfterRestart(t *testing.T, s *suite) {
	b := s.box(t)
	b.guest("guest-echo")
	b.dialled()
	b.stop(0)
	b.start()
	if err := echoed(b.dialled(), []byte("second life")); err != nil {
		t.Error(err)
	}
}

// dialWedged has a guest that listens and never accepts. Where that shows in
// dialling, the context ends it; where it does not, the caller has a
// connection that says nothing, and can be closed.
func dialWedged(t *testing.T, s *suite) {
	b := s.box(t)
	b.guest("guest-wedge")
	b.printed("listening")
	const limit = 200 * time.Millisecond
	for range 5 { // more than wait to be accepted
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		conn, err := b.dial(ctx, guestPort)
		cancel()
		if err != nil {
			continue
		}
		t.Cleanup(func() { conn.Close() })
		if err := conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
			t.Fatalf("SetReadDeadline: %v", err)
		}
		if n, err := conn.Read(make([]byte, 1)); n > 0 {
			t.Errorf("a guest that never accepts said something (%v)", err)
		}
	}
	// It is no less stoppable for that.
	b.stop(long)
	b.exited(0)
}
