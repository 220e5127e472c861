package image

import (
	"context"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/choiros/agent/internal/sandbox"
)

// server is a registry whose answers a test can spoil.
type server struct {
	host  string
	mu    sync.Mutex
	asked []string
	spoil func(w http.ResponseWriter, r *http.Request) bool
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := new(server)
	real := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	listening := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.asked = append(s.asked, r.Method+" "+r.URL.Path)
		spoil := s.spoil
		s.mu.Unlock()
		if spoil == nil || !spoil(w, r) {
			real.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(listening.Close)
	s.host = strings.TrimPrefix(listening.URL, "http://")
	return s
}

func (s *server) set(spoil func(w http.ResponseWriter, r *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spoil, s.asked = spoil, nil
}

// fetched returns how often a path was asked for that has this in it.
func (s *server) fetched(part string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.asked {
		if strings.HasPrefix(a, http.MethodGet) && strings.Contains(a, part) {
			n++
		}
	}
	return n
}

// push puts an image, or an index, into the registry.
func (s *server) push(t *testing.T, repository, tag string, blobs map[string][]byte, d v1.Descriptor) {
	t.Helper()
	put := func(path, media string, content []byte) {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+s.host+"/v2/"+repository+path, strings.NewReader(string(content)))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(path, "/blobs/") {
			r.Method = http.MethodPost
		}
		r.Header.Set("Content-Type", media)
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		if answer.StatusCode != http.StatusCreated {
			t.Fatalf("%s: %s", path, answer.Status)
		}
	}
	for digest, content := range blobs {
		put("/blobs/uploads/?digest="+digest, "application/octet-stream", content)
	}
	put("/manifests/"+tag, string(d.MediaType), blobs[d.Digest.String()])
}

func silent(string) {}

func TestPull(t *testing.T) {
	t.Parallel()
	registry := newServer(t)
	base, top := gzipped(t, layerOf(t, text("base", "1"))), gzipped(t, layerOf(t, text("top", "2")))
	blobs, d := spec{layers: [][]byte{base, top}, diffs: [][]byte{layerOf(t, text("base", "1")), layerOf(t, text("top", "2"))}}.blobsOf(t)
	registry.push(t, "choiros/pulled", "v1", blobs, d)
	s := open(t)
	ref := registry.host + "/choiros/pulled:v1"
	var lines []string
	image, err := s.PullImage(t.Context(), "docker://"+ref, func(line string) { lines = append(lines, line) })
	if err != nil {
		t.Fatal(err)
	}
	if image.Digest != d.Digest.String() || !slices.Equal(image.Names, []string{ref}) {
		t.Errorf("pulled %+v", image)
	}
	if len(lines) < 3 || slices.ContainsFunc(lines, func(l string) bool { return l == "" || strings.Contains(l, "\n") }) {
		t.Errorf("progress was %q", lines)
	}
	if _, err := s.Root(t.Context(), image.Digest, nil); err != nil {
		t.Error(err)
	}
	wantWhole(t, s.dir)

	// What is here already is not fetched again, unless it is damaged.
	if err := os.WriteFile(s.blob(digestOf(top)), []byte("damage"), 0o600); err != nil {
		t.Fatal(err)
	}
	registry.set(nil)
	byDigest, err := s.PullImage(t.Context(), registry.host+"/choiros/pulled@"+image.Digest, silent)
	if err != nil {
		t.Fatal(err)
	}
	if got := registry.fetched(digestOf(base)); got != 0 {
		t.Errorf("the base was fetched %d times more", got)
	}
	if got := registry.fetched(digestOf(top)); got != 1 {
		t.Errorf("what was damaged was fetched %d times", got)
	}
	if byDigest.ID != image.ID || len(byDigest.Names) != 2 {
		t.Errorf("by digest: %+v", byDigest)
	}
	if got, err := s.Resolve(t.Context(), registry.host+"/choiros/pulled:ignored@"+image.Digest, "amd64"); err != nil || got.ID != image.ID {
		t.Errorf("%+v, %v", got, err)
	}
	wantWhole(t, s.dir)
}

// pushIndex puts an image for several platforms of linux into the registry.
func (s *server) pushIndex(t *testing.T, repository string, archs ...string) {
	t.Helper()
	index := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
	for _, arch := range archs {
		blobs, d := spec{arch: arch, layers: [][]byte{layerOf(t, text("arch", arch))}}.blobsOf(t)
		s.push(t, repository, d.Digest.String(), blobs, d)
		d.Platform = &v1.Platform{OS: "linux", Architecture: arch}
		index.Manifests = append(index.Manifests, d)
	}
	content := encode(t, index)
	d := v1.Descriptor{MediaType: types.OCIImageIndex, Digest: v1.Hash{Algorithm: "sha256", Hex: hexOf(digestOf(content))}}
	s.push(t, repository, "latest", map[string][]byte{d.Digest.String(): content}, d)
}

func TestPullChoosesThePlatform(t *testing.T) {
	t.Parallel()
	registry := newServer(t)
	registry.pushIndex(t, "multi", "s390x", "arm64", "amd64")
	for _, arch := range []string{"amd64", "arm64"} {
		s := open(t)
		s.Arch = arch
		if _, err := s.PullImage(t.Context(), registry.host+"/multi", silent); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Resolve(t.Context(), registry.host+"/multi", arch); err != nil || got.Architecture != arch {
			t.Errorf("%+v, %v", got, err)
		}
	}
	s := open(t)
	s.Arch = "riscv64"
	_, err := s.PullImage(t.Context(), registry.host+"/multi", silent)
	if !errors.Is(err, sandbox.ErrInvalid) || !strings.Contains(err.Error(), "riscv64") || !strings.Contains(err.Error(), "linux/s390x") {
		t.Errorf("%v", err)
	}
}

func TestPullTakesAnotherPlatformOnlyIfItCanRun(t *testing.T) {
	t.Parallel()
	registry := newServer(t)
	registry.pushIndex(t, "both", "amd64", "arm64")
	registry.pushIndex(t, "foreign", "s390x", "amd64")
	there := Other{Arch: "amd64"}
	missing := Other{Arch: "amd64", Missing: func() error { return errors.New("the translator is missing; install it") }}
	pull := func(repository string, others ...Other) (string, error) {
		s := open(t)
		s.Arch = "arm64"
		image, err := s.PullImage(t.Context(), registry.host+"/"+repository, silent, others...)
		if err != nil {
			if left := filesOf(t, s); len(left) > 1 {
				t.Errorf("%s: left are %v", repository, left)
			}
			return "", err
		}
		resolved, err := s.Resolve(t.Context(), image.ID, "arm64", others...)
		return resolved.Architecture, err
	}
	for _, others := range [][]Other{nil, {there}, {missing}} {
		if arch, err := pull("both", others...); err != nil || arch != "arm64" {
			t.Errorf("with its own there: %q, %v", arch, err)
		}
	}
	if arch, err := pull("foreign", there); err != nil || arch != "amd64" {
		t.Errorf("without its own: %q, %v", arch, err)
	}
	for want, others := range map[string][]Other{
		"the image is there for linux/s390x, linux/amd64, and not for linux/arm64":                                        nil,
		"the image is there for linux/s390x, linux/amd64, and not for linux/arm64: the translator is missing; install it": {missing},
	} {
		_, err := pull("foreign", others...)
		if wrong, ok := errors.AsType[*sandbox.FieldError](err); !ok || wrong.Problem != want || !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func TestPullThatFailsAddsNothing(t *testing.T) {
	t.Parallel()
	layer := noise(t, 2, 100_000)
	blobs, d := spec{layers: [][]byte{layerOf(t, text("f", "x")), layer}}.blobsOf(t)
	isLayer := func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/blobs/"+digestOf(layer)) }
	status := func(code int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/manifests/") {
				w.WriteHeader(code)
			}
			return strings.Contains(r.URL.Path, "/manifests/")
		}
	}
	body := func(content []byte) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if isLayer(r) {
				_, _ = w.Write(content)
			}
			return isLayer(r)
		}
	}
	changed := slices.Clone(layer)
	changed[1000] ^= 1
	for name, tc := range map[string]struct {
		tag   string
		spoil func(http.ResponseWriter, *http.Request) bool
		want  error
	}{
		"absent":            {"absent", nil, sandbox.ErrNotFound},
		"not allowed":       {"v1", status(http.StatusForbidden), sandbox.ErrDenied},
		"too many requests": {"v1", status(http.StatusTeapot), sandbox.ErrUnavailable},
		"another content":   {"v1", body(changed), sandbox.ErrCorrupt},
		"too long":          {"v1", body(append(slices.Clone(layer), 1)), sandbox.ErrCorrupt},
		"cut short":         {"v1", body(layer[:50_000]), sandbox.ErrUnavailable},
		"broken off": {"v1", func(w http.ResponseWriter, r *http.Request) bool {
			if isLayer(r) {
				_, _ = w.Write(layer[:1000])
				panic(http.ErrAbortHandler)
			}
			return false
		}, sandbox.ErrUnavailable},
		"another manifest": {"v1", func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/manifests/") {
				w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
				_, _ = w.Write([]byte("{}"))
			}
			return strings.Contains(r.URL.Path, "/manifests/")
		}, sandbox.ErrUnsupported},
	} {
		registry := newServer(t)
		registry.push(t, "a", "v1", blobs, d)
		registry.set(tc.spoil)
		s := open(t)
		if image, err := s.PullImage(t.Context(), registry.host+"/a:"+tc.tag, silent); !errors.Is(err, tc.want) {
			t.Errorf("%s: %+v, %v", name, image, err)
		}
		if left := filesOf(t, s); !slices.Equal(left, []string{"oci-layout"}) {
			t.Errorf("%s: left %v", name, left)
		}
	}
	registry := newServer(t)
	registry.push(t, "a", "v1", blobs, d)
	ctx, cancel := context.WithCancel(t.Context())
	registry.set(func(_ http.ResponseWriter, r *http.Request) bool {
		if isLayer(r) {
			cancel()
			<-r.Context().Done()
		}
		return isLayer(r)
	})
	s := open(t)
	if _, err := s.PullImage(ctx, registry.host+"/a:v1", silent); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	for _, bad := range []string{"oci-archive:/etc/passwd", "/etc/passwd", "case/UPPER", "", "a@sha512:" + strings.Repeat("0", 128)} {
		_, err := s.PullImage(t.Context(), bad, silent)
		if wrong, ok := errors.AsType[*sandbox.FieldError](err); !ok || wrong.Field != referenceField || !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q: %v, want invalid", bad, err)
		}
	}
	if _, err := s.PullImage(t.Context(), "127.0.0.1:1/a", silent); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("no registry: %v", err)
	}
	if left := filesOf(t, s); !slices.Equal(left, []string{"oci-layout"}) {
		t.Errorf("left %v", left)
	}
}

func TestPullTakesLocalhostForARegistry(t *testing.T) {
	t.Parallel()
	for ref, want := range map[string]string{
		"localhost/a":   "localhost/a:latest",
		"alpine":        "index.docker.io/library/alpine:latest",
		"quay.io/a/b:c": "quay.io/a/b:c",
	} {
		if _, at, _, err := parseRemote(ref); err != nil || at.Name() != want {
			t.Errorf("%s: %v, %v; want %s", ref, at, err, want)
		}
	}
}
