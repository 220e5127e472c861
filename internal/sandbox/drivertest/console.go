package drivertest

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

func consoleTests() []test {
	return []test{
		{"ConsoleChangesNothing", consoleChangesNothing},
		{"ConsoleEndsWithTheLife", consoleEnds},
		{"ConsoleOfWhatDoesNotRun", consoleOfNotRunning},
	}
}

func (b *box) tryConsole() (net.Conn, error) {
	b.t.Helper()
	a := step(b.t, b.s, context.WithoutCancel(b.t.Context()), "Console", func(ctx context.Context, d sandbox.Driver) (net.Conn, error) {
		return d.(sandbox.Console).Console(ctx, b.ref)
	})
	if a.err == nil && a.value == nil {
		b.t.Fatal("Console returned neither a connection nor an error")
	}
	return a.value, a.err
}

// console opens a console by a driver, and a context, that are gone then.
func (b *box) console() net.Conn {
	b.t.Helper()
	conn, err := b.tryConsole()
	b.must("Console", err)
	b.t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(b.s.Patience)); err != nil {
		b.t.Fatalf("SetDeadline: %v", err)
	}
	return conn
}

func consoleChangesNothing(t *testing.T, s *suite) {
	b := s.box(t)
	life := b.sleeper()
	first, second := b.console(), b.console()
	if _, err := first.Write([]byte("\n")); err != nil {
		t.Errorf("typing: %v", err)
	}
	b.must("Close", first.Close())
	if _, err := second.Write([]byte("\n")); err != nil {
		t.Errorf("typing when another has left: %v", err)
	}
	b.must("Close", second.Close())
	b.undisturbed(life)
	b.must("Close", b.console().Close())
	b.stop(long)
	b.exited(0)
}

func consoleEnds(t *testing.T, s *suite) {
	b := s.box(t)
	b.sleeper()
	conn := b.console()
	b.stop(long)
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the sandbox has ended, and its console has not: %v", err)
	}
}

func consoleOfNotRunning(t *testing.T, s *suite) {
	b := s.box(t)
	want := func() {
		t.Helper()
		if conn, err := b.tryConsole(); err == nil {
			conn.Close()
			t.Errorf("Console of one that is %s succeeded", b.inspect().State)
		}
	}
	want()
	b.create("ready-after", "0s", "/data/ready")
	want()
	b.startSleeper()
	b.stop(long)
	want()
}
