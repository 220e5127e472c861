//go:build linux

package reach

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

func awaitHTTP(port uint32, path string) *guestv1.AwaitReady {
	return &guestv1.AwaitReady{IntervalMillis: 10, Probe: &guestv1.AwaitReady_Http{Http: &guestv1.HttpProbe{Port: port, Path: path}}}
}

func awaitExec(command ...string) *guestv1.AwaitReady {
	return &guestv1.AwaitReady{IntervalMillis: 1000, Probe: &guestv1.AwaitReady_Exec{Exec: &guestv1.ExecProbe{Command: command}}}
}

func TestAwaitReadyTellsWhatHTTPAnswers(t *testing.T) {
	t.Parallel()
	answers := make(chan string)
	requests := make(chan string, 100)
	port := serve(t, "127.0.0.1:0", func(conn *net.TCPConn) {
		buffer := make([]byte, 4096)
		n, _ := conn.Read(buffer)
		requests <- string(buffer[:n])
		answer, open := <-answers
		if !open {
			answer = "HTTP/1.1 204 No Content\r\n\r\n"
		}
		_, _ = io.WriteString(conn, answer)
	})
	agent, guest := channel(t)
	call(t, guest, func(ctx context.Context) error {
		return New(nil).AwaitReady(ctx, guest, awaitHTTP(port, "/health?x=1"))
	})
	answered(t, agent)
	for _, step := range []struct{ answer, message string }{
		{"HTTP/1.1 503 Service Unavailable\r\n\r\n", "status 503"},
		{"HTTP/1.0 404\r\n\r\n", "status 404"},
		{"", "closed without an answer"},
		{"SSH-2.0-OpenSSH_9.9\r\n", "does not speak HTTP"},
		{"HTTP/1.1 500 Internal Server Error\n", "status 500"},
		{"HTTP/1.1 400 " + strings.Repeat("x", maxStatusLine), "does not speak HTTP"},
	} {
		answers <- step.answer
		for note := new(guestv1.ProbeNote); !strings.Contains(note.GetMessage(), step.message); {
			receive(t, agent, note)
			if note.GetReady() {
				t.Fatalf("ready after %q", step.answer)
			}
		}
	}
	close(answers)
	note := receive(t, agent, &guestv1.ProbeNote{})
	if !note.GetReady() {
		note = receive(t, agent, note)
	}
	if !note.GetReady() || note.GetMessage() != "" {
		t.Errorf("%v", note)
	}
	want := fmt.Sprintf("GET /health?x=1 HTTP/1.1\r\nHost: localhost:%d\r\nUser-Agent: guestd\r\n", port)
	if request := <-requests; !strings.HasPrefix(request, want) || !strings.HasSuffix(request, "\r\n\r\n") {
		t.Errorf("asked %q", request)
	}
	if kind, _, err := agent.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("after ready: kind %v, %v", kind, err)
	}
}

func TestAwaitReadySeesAPortAtOnce(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	agent, guest := channel(t)
	// An interval far beyond the test's patience: only early probes can see it.
	request := &guestv1.AwaitReady{IntervalMillis: 1 << 30, Probe: &guestv1.AwaitReady_Tcp{Tcp: &guestv1.TcpProbe{Port: port}}}
	call(t, guest, func(ctx context.Context) error { return New(nil).AwaitReady(ctx, guest, request) })
	answered(t, agent)
	note := receive(t, agent, &guestv1.ProbeNote{})
	if want := fmt.Sprintf("nothing listens on port %d", port); note.GetReady() || note.GetMessage() != want {
		t.Fatalf("%v", note)
	}
	serve(t, fmt.Sprintf("[::1]:%d", port), echo)
	if note = receive(t, agent, note); !note.GetReady() {
		t.Errorf("%v", note)
	}
}

func TestAwaitReadyRunsCommands(t *testing.T) {
	t.Parallel()
	marks := t.TempDir()
	s := New(func(ctx context.Context, command []string) (int, error) {
		cmd := exec.CommandContext(ctx, command[0], command[1:]...)
		cmd.Dir = marks
		err := cmd.Run()
		if ended, ok := errors.AsType[*exec.ExitError](err); ok {
			return ended.ExitCode(), nil
		}
		return 0, err
	})
	agent, guest := channel(t)
	// Fails twice, differently, and then does not.
	script := "test -e a || { >a; exit 3; }; test -e b || { >b; exit 4; }"
	call(t, guest, func(ctx context.Context) error {
		return s.AwaitReady(ctx, guest, awaitExec("/bin/sh", "-c", script))
	})
	answered(t, agent)
	for _, want := range []string{"exit status 3", "exit status 4", ""} {
		if note := receive(t, agent, &guestv1.ProbeNote{}); note.GetMessage() != want || note.GetReady() != (want == "") {
			t.Fatalf("%v, not %q", note, want)
		}
	}
}

func TestAwaitReadyWithoutProbe(t *testing.T) {
	t.Parallel()
	agent, guest := channel(t)
	call(t, guest, func(ctx context.Context) error { return New(nil).AwaitReady(ctx, guest, &guestv1.AwaitReady{}) })
	answered(t, agent)
	if note := receive(t, agent, &guestv1.ProbeNote{}); !note.GetReady() {
		t.Errorf("%v", note)
	}
}

func TestAwaitReadyRefusesWhatCannotBe(t *testing.T) {
	t.Parallel()
	for name, request := range map[string]*guestv1.AwaitReady{
		"no port":         awaitHTTP(0, "/"),
		"port too large":  {Probe: &guestv1.AwaitReady_Tcp{Tcp: &guestv1.TcpProbe{Port: 65536}}},
		"not a path":      awaitHTTP(80, "health"),
		"a second header": awaitHTTP(80, "/ HTTP/1.1\r\nX: y"),
		"no command":      awaitExec(),
	} {
		err := New(nil).AwaitReady(t.Context(), nil, request)
		failed, ok := errors.AsType[*wire.FailureError](err)
		if !ok || failed.Failure.GetCode() != guestv1.Failure_CODE_INVALID {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAwaitReadyPaces: the pauses grow with the time waited and never beyond
// the interval, notes come once for each change, and a command that does not
// end is given up.
func TestAwaitReadyPaces(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer near.Close()
		agent := wire.New(near, wire.MaxFromGuest)
		start := time.Now()
		var at []time.Duration
		s := New(func(ctx context.Context, _ []string) (int, error) {
			at = append(at, time.Since(start))
			switch {
			case len(at) < 20:
				return 1, nil
			case len(at) == 20:
				<-ctx.Done()
				return 0, ctx.Err()
			}
			return 0, nil
		})
		done := make(chan error, 1)
		go func() { done <- s.AwaitReady(t.Context(), wire.New(far, wire.MaxFrame), awaitExec("x")) }()
		answered(t, agent)
		for _, want := range []string{"exit status 1", "no answer within 1m0s", ""} {
			if note := receive(t, agent, &guestv1.ProbeNote{}); note.GetMessage() != want || note.GetReady() != (want == "") {
				t.Fatalf("%v, not %q", note, want)
			}
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		for i := 1; i < 20; i++ {
			if pause := at[i] - at[i-1]; pause > time.Second || pause > max(firstPause, at[i-1]/2) {
				t.Errorf("paused %v after %v", pause, at[i-1])
			}
		}
		if last := at[19] - at[18]; last != time.Second {
			t.Errorf("paused %v in the end", last)
		}
	})
}

func TestAwaitReadyEndsWithItsContext(t *testing.T) {
	t.Parallel()
	silent := serve(t, "127.0.0.1:0", func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) })
	agent, guest := channel(t)
	end := call(t, guest, func(ctx context.Context) error { return New(nil).AwaitReady(ctx, guest, awaitHTTP(silent, "")) })
	answered(t, agent)
	if err := end(); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func FuzzStatus(f *testing.F) {
	for _, seed := range []string{"HTTP/1.1 200 OK\r", "HTTP/1.0 404", "HTTP/2 200", "HTTP/1.1 20", "", "HTTP/1.1  200"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		status, err := parseStatus(line)
		if err == nil && (status > 999 || !strings.Contains(string(line), fmt.Sprintf(" %03d", status))) {
			t.Errorf("%q is status %d", line, status)
		}
	})
}
