package container

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/test/image"
)

// testImage is the archive of an image of the given name that is no other's.
func testImage(t *testing.T, reference string, format image.Format) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := image.Write(&b, []byte("program of "+newOwner()), image.Spec{Name: reference, Format: format}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func names(images []sandbox.Image) []string {
	var all []string
	for _, i := range images {
		all = append(all, i.Names...)
	}
	return all
}

func TestLoadListRemove(t *testing.T) {
	t.Parallel()
	d := backend(t)
	for _, format := range []image.Format{image.OCI, image.Docker} {
		reference := "localhost/choiros/test-" + newOwner() + ":v1"
		loaded, err := d.LoadImage(t.Context(), iotest.HalfReader(bytes.NewReader(testImage(t, reference, format))))
		if err != nil {
			t.Fatal(err)
		}
		if len(loaded) != 1 || !slices.Contains(loaded[0].Names, reference) || !strings.HasPrefix(loaded[0].ID, "sha256:") ||
			!strings.HasPrefix(loaded[0].Digest, "sha256:") || loaded[0].SizeBytes == 0 {
			t.Errorf("%s: loaded %+v", format, loaded)
		}
		listed, err := d.Images(t.Context())
		if err != nil || !slices.ContainsFunc(listed, func(i sandbox.Image) bool { return cmp.Equal(i, loaded[0]) }) {
			t.Errorf("%s: Images lacks it: %+v, %v", format, listed, err)
		}
		b := newBox(t, d)
		spec := program(reference)
		if err := d.Validate(t.Context(), spec); err != nil {
			t.Errorf("Validate: %v", err)
		}
		b.must("Create", d.Create(t.Context(), b.ref, spec))
		if err := d.RemoveImage(t.Context(), reference); !errors.Is(err, sandbox.ErrState) {
			t.Errorf("%s: removing one in use: %v, want a wrong state", format, err)
		}
		b.must("Delete", d.Delete(t.Context(), b.ref))
		if err := d.RemoveImage(t.Context(), loaded[0].ID); err != nil {
			t.Errorf("%s: RemoveImage: %v", format, err)
		}
		for _, gone := range []string{reference, loaded[0].ID, "localhost/no/such:image"} {
			if err := d.RemoveImage(t.Context(), gone); !errors.Is(err, sandbox.ErrNotFound) {
				t.Errorf("%s: removing %s, which is absent: %v", format, gone, err)
			}
		}
		err = d.Validate(t.Context(), spec)
		var wrong *sandbox.FieldError
		if !errors.As(err, &wrong) || wrong.Field != "spec.image" || !errors.Is(err, sandbox.ErrNotFound) || !strings.Contains(err.Error(), "agentctl image") {
			t.Errorf("%s: Validate without the image: %v", format, err)
		}
	}
}

func TestLoadOfTheCorruptAddsNothing(t *testing.T) {
	t.Parallel()
	d := backend(t)
	reference := "localhost/choiros/test-" + newOwner() + ":v1"
	wantNone := func(what string) {
		t.Helper()
		images, err := d.Images(t.Context())
		if err != nil || slices.Contains(names(images), reference) {
			t.Errorf("%s: the image is there (%v)", what, err)
		}
	}
	for _, format := range []image.Format{image.OCI, image.Docker} {
		archive := testImage(t, reference, format)
		for _, cut := range []int{0, 1, 600, len(archive) / 2, len(archive) - 1100} {
			_, err := d.LoadImage(t.Context(), bytes.NewReader(archive[:cut]))
			wantCorrupt(t, string(format)+" cut short", err)
			wantNone("cut short")
		}
		files := entries(t, archive)
		largest := slices.MaxFunc(files, func(a, b tarFile) int { return len(a.content) - len(b.content) })
		largest.content[len(largest.content)/2] ^= 1
		_, err := d.LoadImage(t.Context(), bytes.NewReader(tarOf(t, files)))
		wantCorrupt(t, string(format)+" with another layer", err)
		wantNone("flipped")

		gone := errors.New("the client has gone")
		_, err = d.LoadImage(t.Context(), io.MultiReader(bytes.NewReader(archive[:len(archive)/2]), iotest.ErrReader(gone)))
		if !errors.Is(err, gone) {
			t.Errorf("%v, want the reader's error", err)
		}
		wantNone("a client that went")

		ctx, cancel := context.WithCancel(t.Context())
		endless := io.MultiReader(bytes.NewReader(archive[:1000]), readerFunc(func([]byte) (int, error) {
			cancel()
			return 0, nil
		}))
		if _, err := d.LoadImage(ctx, iotest.TimeoutReader(endless)); err == nil {
			t.Error("a cancelled load succeeded")
		}
		wantNone("cancelled")
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestValidateNeverPulls(t *testing.T) {
	t.Parallel()
	d := backend(t)
	spec := program("127.0.0.1:1/not/here:latest", "sleep")
	if err := d.Validate(t.Context(), spec); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("Validate: %v", err)
	}
	b := newBox(t, d)
	if err := d.Create(t.Context(), b.ref, spec); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("Create: %v", err)
	}
}

// trustedRegistry serves a registry that Podman trusts: its certificate is put
// where containers-certs.d(5) says, under a port that nobody else has.
func trustedRegistry(t *testing.T) (host string, transport remote.Option) {
	t.Helper()
	server := httptest.NewTLSServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	host = strings.TrimPrefix(server.URL, "https://")
	configDir, err := os.UserConfigDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(configDir, "containers", "certs.d", host)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), cert, 0o600); err != nil {
		t.Fatal(err)
	}
	return host, remote.WithTransport(server.Client().Transport)
}

func TestPull(t *testing.T) {
	t.Parallel()
	d := backend(t)
	host, transport := trustedRegistry(t)
	reference := host + "/choiros/pulled:v1"
	archive := testImage(t, "localhost/pulled:v1", image.Docker)
	img, err := tarball.Image(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(archive)), nil }, nil)
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(reference)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, img, transport); err != nil {
		t.Fatal(err)
	}

	var lines []string
	pulled, err := d.PullImage(t.Context(), reference, func(line string) { lines = append(lines, line) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.RemoveImage(context.Background(), reference); err != nil {
			t.Error(err)
		}
	})
	if !slices.Contains(pulled.Names, reference) {
		t.Errorf("pulled %+v", pulled)
	}
	if len(lines) == 0 || slices.ContainsFunc(lines, func(l string) bool { return l == "" || strings.Contains(l, "\n") }) {
		t.Errorf("progress was %q", lines)
	}
	if _, err := d.PullImage(t.Context(), host+"/choiros/absent:v1", func(string) {}); err == nil || errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("pulling what the registry does not have: %v", err)
	}
	for _, bad := range []string{"oci-archive:/etc/passwd", "/etc/passwd", "case/UPPER"} {
		if _, err := d.PullImage(t.Context(), bad, func(string) {}); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v, want invalid", bad, err)
		}
	}
}

func TestPullThatBreaksOff(t *testing.T) {
	t.Parallel()
	for stream, want := range map[string]error{
		`{"stream":"Trying to pull\n"}{"stre`:          sandbox.ErrUnavailable,
		`{"stream":"Trying to pull\n"}`:                sandbox.ErrUnavailable,
		`{"stream":"Trying\n"}{"error":"no manifest"}`: nil,
	} {
		d, _ := newFake(t, "5.4.2", streaming(stream))
		var lines []string
		_, err := d.PullImage(t.Context(), "registry/image", func(line string) { lines = append(lines, line) })
		if err == nil || want != nil && !errors.Is(err, want) || want == nil && !strings.Contains(err.Error(), "no manifest") {
			t.Errorf("%s: %v, want %v", stream, err, want)
		}
		if len(lines) != 1 {
			t.Errorf("%s: progress was %q", stream, lines)
		}
	}
}
