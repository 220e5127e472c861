package container

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containers/podman/v5/libpod/define"

	"github.com/choiros/agent/internal/sandbox"
)

// wantUnavailable wants an *UnavailableError that says something and has a cure.
func wantUnavailable(t *testing.T, err error, says, cure string) {
	t.Helper()
	var unavailable *sandbox.UnavailableError
	if !errors.As(err, &unavailable) || !errors.Is(err, sandbox.ErrUnavailable) {
		t.Fatalf("%v, want an *UnavailableError", err)
	}
	if !strings.Contains(err.Error(), says) || !strings.Contains(unavailable.Cure, cure) {
		t.Errorf("%q, mended by %q; want %q and %q", err, unavailable.Cure, says, cure)
	}
}

func TestProbeSaysWhatIsWrongWithTheSocket(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	stale := filepath.Join(dir, "stale")
	listener, err := net.Listen("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false)
	listener.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	uid := os.Getuid()
	if uid == 0 {
		uid = 1
		if err := os.Chown(stale, 1, 1); err != nil {
			t.Fatal(err)
		}
	}
	for name, test := range map[string]struct {
		cfg        Config
		uid        int
		says, cure string
	}{
		"missing":        {Config{Socket: filepath.Join(dir, "missing")}, uid, "does not exist", "podman.socket"},
		"missing in two": {Config{RuntimeDir: dir}, 1 << 30, "podman/podman.sock does not exist", "podman.socket"},
		"stale":          {Config{Socket: stale}, uid, "nobody listens", "restart podman.socket"},
		"a URL":          {Config{Socket: "unix://" + stale}, uid, "nobody listens", "restart podman.socket"},
		"a file":         {Config{Socket: file}, uid, "is not a socket", ""},
		"another user's": {Config{Socket: stale}, uid + 1, "user with id", "ordinary user"},
	} {
		test.cfg.Owner = newOwner()
		d, err := New(test.cfg)
		if err != nil {
			t.Fatal(err)
		}
		d.uid = test.uid
		begun := time.Now()
		_, err = d.Probe(t.Context())
		t.Run(name, func(t *testing.T) { wantUnavailable(t, err, test.says, test.cure) })
		if took := time.Since(begun); took > 300*time.Millisecond {
			t.Errorf("%s: it took %s to notice", name, took)
		}
		if _, err := d.List(t.Context()); !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("%s: List: %v", name, err)
		}
	}
}

func TestRootsPodmanIsRefused(t *testing.T) {
	t.Parallel()
	if os.Getuid() == 0 {
		socket := filepath.Join(shortDir(t), "s")
		listener, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		wantUnavailable(t, checkSocketOwner(socket, 1000), "is root's", "ordinary user")
	}
	// One that lies about its socket.
	d, _ := newFake(t, "5.4.2", func(w http.ResponseWriter, _ *http.Request, path string) {
		if path != "/info" {
			t.Errorf("%s was asked for", path)
		}
		_, _ = io.WriteString(w, `{"host":{"security":{"rootless":false}}}`)
	})
	_, err := d.Probe(t.Context())
	wantUnavailable(t, err, "runs as root", "ordinary user")
}

func TestOldPodmanIsRefused(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"4.9.4", "3.4.4", "no version"} {
		d, f := newFake(t, version, nil)
		_, err := d.Probe(t.Context())
		wantUnavailable(t, err, "podman at "+f.socket, "podman 5")
		if n := f.requests.Load(); n > 0 {
			t.Errorf("version %s was asked %d times", version, n)
		}
	}
}

func TestTranslate(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		status int
		cause  string
		want   error
	}{
		"no such container":  {http.StatusNotFound, define.ErrNoSuchCtr.Error(), sandbox.ErrNotFound},
		"being removed":      {http.StatusInternalServerError, define.ErrCtrRemoved.Error(), sandbox.ErrNotFound},
		"wrong state":        {http.StatusInternalServerError, define.ErrCtrStateInvalid.Error(), sandbox.ErrState},
		"conflict":           {http.StatusConflict, "image used by something", sandbox.ErrState},
		"bad request":        {http.StatusBadRequest, "cannot be parsed", sandbox.ErrInvalid},
		"full disk":          {http.StatusInternalServerError, syscall.ENOSPC.Error(), sandbox.ErrExhausted},
		"full disk, at last": {http.StatusInternalServerError, "* docker-archive: write /var/tmp/x: " + syscall.ENOSPC.Error(), sandbox.ErrExhausted},
		"quota":              {http.StatusInternalServerError, syscall.EDQUOT.Error(), sandbox.ErrExhausted},
	} {
		d, f := newFake(t, "5.4.2", func(w http.ResponseWriter, _ *http.Request, _ string) {
			answer(w, test.status, test.cause, "what podman says")
		})
		_, err := d.List(t.Context())
		if !errors.Is(err, test.want) || !strings.Contains(err.Error(), "podman: what podman says") {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
		if n := f.requests.Load(); n != 1 {
			t.Errorf("%s: %d requests were made", name, n)
		}
	}
}

func TestAnswersThatAreNone(t *testing.T) {
	t.Parallel()
	for name, body := range map[string]string{"not JSON": "<html>", "of another kind": `{"x":1}`} {
		d, _ := newFake(t, "5.4.2", func(w http.ResponseWriter, _ *http.Request, _ string) { _, _ = io.WriteString(w, body) })
		_, err := d.List(t.Context())
		t.Run(name, func(t *testing.T) { wantUnavailable(t, err, "cannot be used", "restart") })
	}
}

// hangUp ends a connection without an answer, as a killed Podman does.
func hangUp(t *testing.T, w http.ResponseWriter, head string) {
	t.Helper()
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	_, _ = io.WriteString(conn, head)
	conn.Close()
}

func TestPodmanVanishesMidCall(t *testing.T) {
	t.Parallel()
	for name, head := range map[string]string{
		"before it answers": "",
		"in the headers":    "HTTP/1.1 200 OK\r\nContent-",
		"in the body":       "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[{",
	} {
		d, f := newFake(t, "5.4.2", func(w http.ResponseWriter, _ *http.Request, _ string) { hangUp(t, w, head) })
		begun := time.Now()
		_, err := d.List(t.Context())
		t.Run(name, func(t *testing.T) { wantUnavailable(t, err, "podman", "podman") })
		if took := time.Since(begun); took > 300*time.Millisecond {
			t.Errorf("%s: it took %s to notice", name, took)
		}
		// A request that may have had an effect is never made again.
		if n := f.requests.Load(); n != 1 {
			t.Errorf("%s: %d requests were made", name, n)
		}
	}
}

func TestCallsEndWithTheirContext(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	d, f := newFake(t, "5.4.2", func(_ http.ResponseWriter, r *http.Request, _ string) {
		select {
		case <-release:
		case <-r.Context().Done():
		}
	})
	defer close(release)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	begun := time.Now()
	if _, err := d.List(ctx); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("List: %v, want the context's error", err)
	}
	if took := time.Since(begun); took > time.Second {
		t.Errorf("List took %s", took)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	before := f.requests.Load()
	if _, err := d.Inspect(cancelled, sandbox.Ref{ID: "a"}); !errors.Is(err, context.Canceled) {
		t.Errorf("Inspect: %v, want the context's error", err)
	}
	if f.requests.Load() != before {
		t.Error("a request was made for a caller who had left")
	}
	// The call's own deadline is Podman's fault and not the caller's.
	err := d.call(t.Context(), 50*time.Millisecond, func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	})
	wantUnavailable(t, err, "does not answer", "restart")
}

func TestSettleOutlivesItsCaller(t *testing.T) {
	t.Parallel()
	entered, release, left := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	d, _ := newFake(t, "5.4.2", nil)
	ctx, cancel := context.WithCancel(t.Context())
	finished := make(chan error, 1)
	go func() {
		left <- d.settle(ctx, time.Minute, func(ctx context.Context) error {
			close(entered)
			<-release
			finished <- ctx.Err()
			return nil
		})
	}()
	<-entered
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("settle: %v", err)
	}
	close(release)
	if err := <-finished; err != nil {
		t.Errorf("the call was cancelled with its caller: %v", err)
	}
	if err := d.Close(); err != nil { // waits for it
		t.Error(err)
	}
}

func TestNewServiceIsFoundAfterTheOldOne(t *testing.T) {
	t.Parallel()
	list := func(w http.ResponseWriter, _ *http.Request, _ string) { _, _ = io.WriteString(w, "[]") }
	d, f := newFake(t, "5.4.2", list)
	if _, err := d.List(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.server.Close()
	if _, err := d.List(t.Context()); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("with no service: %v", err)
	}
	other, g := newFake(t, "5.4.2", list)
	other.Close()
	if err := os.Rename(g.socket, f.socket); err != nil {
		t.Fatal(err)
	}
	if _, err := d.List(t.Context()); err != nil {
		t.Errorf("with another service at the same place: %v", err)
	}
}
