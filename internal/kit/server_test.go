package kit_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/kit"
	"github.com/choiros/agent/internal/sandbox"
)

// release serves an archive and its checksums below /v1/.
func release(t *testing.T, archive []byte, more map[string]http.HandlerFunc) *httptest.Server {
	t.Helper()
	mux := http.NewServeMux()
	for pattern, handler := range more {
		mux.HandleFunc(pattern, handler)
	}
	mux.HandleFunc("/v1/kit.tar.gz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(archive) })
	mux.HandleFunc("/v1/SHA256SUMS", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "%s  kit.tar.gz\n%[1]s  moved.tar.gz\n%[1]s  stalls.tar.gz\n", sumOf(archive))
	})
	server := httptest.NewTLSServer(mux)
	t.Cleanup(server.Close)
	return server
}

func TestInstallFetchesOverHTTPS(t *testing.T) {
	t.Parallel()
	f := whole("6.12.1")
	archive := f.archive(t, f.headers()...)
	server := release(t, archive, map[string]http.HandlerFunc{
		"/v1/moved.tar.gz": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/v1/kit.tar.gz", http.StatusFound) },
	})
	for name, o := range map[string]kit.Options{
		"with the checksum beside it": {Source: server.URL + "/v1/kit.tar.gz"},
		"with a checksum":             {Source: server.URL + "/v1/kit.tar.gz", SHA256: sumOf(archive)},
		"sent on":                     {Source: server.URL + "/v1/moved.tar.gz?token=x"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o.Dir, o.Arch, o.Transport = kits(t), "arm64", server.Client().Transport
			_, err := kit.Install(t.Context(), o)
			check(t, err)
			if diff := cmp.Diff(f, installed(t, o.Dir)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestInstallFailsWithAServer(t *testing.T) {
	t.Parallel()
	f := whole("6.12.1")
	archive := f.archive(t, f.headers()...)
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	hold := make(chan struct{})
	server := release(t, archive, map[string]http.HandlerFunc{
		"/v1/plain": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, plain.URL+"/x", http.StatusFound) },
		"/v1/loop":  func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/v1/loop", http.StatusFound) },
		"/v1/broken": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(archive)))
			_, _ = w.Write(archive[:len(archive)/2])
		},
		"/v1/huge":      func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", fmt.Sprint(1<<40)) },
		"/v1/forbidden": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) },
		"/v1/stalls": func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write(archive[:1])
			_ = http.NewResponseController(w).Flush()
			select {
			case <-hold:
			case <-r.Context().Done():
			}
		},
	})
	t.Cleanup(func() { close(hold) }) // before the server is closed
	for name, test := range map[string]struct {
		path, sum string
		want      string
		is        error
	}{
		"not there":       {"/v1/none", sumOf(nil), "404 Not Found", sandbox.ErrNotFound},
		"no checksums":    {"/v2/kit.tar.gz", "", "SHA256SUMS beside it cannot be had", sandbox.ErrNotFound},
		"forbidden":       {"/v1/forbidden?token=geheim", sumOf(nil), "403 Forbidden", nil},
		"another":         {"/v1/kit.tar.gz", sumOf(nil), "truncated, or another", sandbox.ErrCorrupt},
		"cut off":         {"/v1/broken", sumOf(archive), "unexpected EOF", nil},
		"too long":        {"/v1/huge", sumOf(archive), "it has 1099511627776 bytes", sandbox.ErrCorrupt},
		"sent on to http": {"/v1/plain?token=geheim", sumOf(archive), "which is not https", nil},
		"sent in circles": {"/v1/loop", sumOf(archive), "more than 10 times", nil},
		"silent":          {"/v1/stalls", sumOf(archive), "sends nothing", sandbox.ErrTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := kits(t)
			o := kit.Options{
				Source: server.URL + test.path, SHA256: test.sum, Dir: dir, Arch: "arm64", Transport: server.Client().Transport,
			}
			if name == "silent" {
				o.StallLimit = 200 * time.Millisecond
			}
			_, err := kit.Install(t.Context(), o)
			if err == nil || !strings.Contains(err.Error(), test.want) || test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("error %v\nwant one with %q", err, test.want)
			}
			if strings.Contains(fmt.Sprint(err), "geheim") {
				t.Errorf("the error has the token in it: %v", err)
			}
			if left := tree(t, dir); left != nil {
				t.Errorf("it left %q", left)
			}
		})
	}
}

// While one is being installed a second one is refused; given up, it leaves
// nothing.
func TestInstallIsOneAtATimeAndCanBeGivenUp(t *testing.T) {
	t.Parallel()
	f, begun := whole("6.12.1"), make(chan struct{})
	archive := f.archive(t, f.headers()...)
	server := release(t, archive, map[string]http.HandlerFunc{
		"/v1/slow": func(_ http.ResponseWriter, r *http.Request) {
			close(begun)
			<-r.Context().Done()
		},
	})
	dir := kits(t)
	o := kit.Options{Source: server.URL + "/v1/slow", SHA256: sumOf(archive), Dir: dir, Arch: "arm64", Transport: server.Client().Transport}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := kit.Install(ctx, o)
		ended <- err
	}()
	<-begun
	o.Source = filepath.Join(save(t, archive))
	if _, err := kit.Install(t.Context(), o); !errors.Is(err, sandbox.ErrState) {
		t.Errorf("a second one: %v", err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	if left := tree(t, dir); left != nil {
		t.Errorf("it left %q", left)
	}
	_, err := kit.Install(t.Context(), o)
	check(t, err)
}
