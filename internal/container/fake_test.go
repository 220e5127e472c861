package container

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"sync/atomic"
	"testing"

	"github.com/containers/podman/v5/pkg/errorhandling"
)

// fakePodman stands for a Podman that misbehaves in ways that the real one
// cannot be brought to. It is a real server on a real socket.
type fakePodman struct {
	socket string
	server *httptest.Server
	// requests counts those but the ping.
	requests atomic.Int64
}

var versionedPath = regexp.MustCompile(`^/v[0-9.]+/libpod`)

// newFake returns a driver and the fake Podman that it reaches. handle gets the
// path behind /v5.x/libpod; nil: nothing is found.
func newFake(t *testing.T, version string, handle func(w http.ResponseWriter, r *http.Request, path string)) (*Driver, *fakePodman) {
	t.Helper()
	f := &fakePodman{socket: filepath.Join(shortDir(t), "podman.sock")}
	listener, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	f.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := versionedPath.ReplaceAllString(r.URL.Path, "")
		w.Header().Set("Libpod-API-Version", version)
		switch {
		case path == "/_ping":
		case handle == nil:
			f.requests.Add(1)
			answer(w, http.StatusNotFound, "no such thing", "there is no such thing")
		default:
			f.requests.Add(1)
			handle(w, r, path)
		}
	}))
	f.server.Listener.Close()
	f.server.Listener = listener
	f.server.Start()
	t.Cleanup(f.server.Close)
	d, err := New(Config{Socket: f.socket, Owner: newOwner(), GuestdDir: fakeGuestd(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	if d.uid == 0 {
		// A socket of root's would be refused.
		d.uid = 1
		if err := os.Chown(f.socket, 1, 1); err != nil {
			t.Fatal(err)
		}
	}
	return d, f
}

// answer writes an error as Podman does.
func answer(w http.ResponseWriter, status int, cause, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(errorhandling.ErrorModel{Because: cause, Message: message, ResponseCode: status})
}

// shortDir is a folder whose path leaves room for a socket's name.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "c")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// streaming answers everything with a stream.
func streaming(text string) func(w http.ResponseWriter, r *http.Request, path string) {
	return func(w http.ResponseWriter, _ *http.Request, _ string) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, text)
	}
}
