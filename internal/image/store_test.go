package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/choiros/agent/internal/sandbox"
	testimage "github.com/choiros/agent/test/image"
)

func free(string) bool { return false }

// filesOf returns what is in the store's folder, but for its lock.
func filesOf(t testing.TB, s *Store) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(s.dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && d.Name() != "lock" {
			path, err = filepath.Rel(s.dir, path)
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// projectImage is an archive of the project's own kind of image.
func projectImage(t testing.TB, name string, format testimage.Format) []byte {
	t.Helper()
	var b bytes.Buffer
	program := bytes.Repeat([]byte("program of "+name+"\n"), 1000)
	if err := testimage.Write(&b, program, testimage.Spec{Name: name, Format: format, User: "1000"}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestLoadListResolveRemove(t *testing.T) {
	t.Parallel()
	for _, format := range []testimage.Format{testimage.OCI, testimage.Docker} {
		for _, zip := range []bool{false, true} {
			s := open(t)
			archive := projectImage(t, "localhost/choiros/test:v1", format)
			if zip {
				archive = gzipped(t, archive)
			}
			loaded, err := s.LoadImage(t.Context(), iotest.HalfReader(bytes.NewReader(archive)))
			if err != nil {
				t.Fatal(err)
			}
			if len(loaded) != 1 || !slices.Equal(loaded[0].Names, []string{"localhost/choiros/test:v1"}) ||
				!digestPattern.MatchString(loaded[0].ID) || !digestPattern.MatchString(loaded[0].Digest) || loaded[0].SizeBytes == 0 {
				t.Errorf("%s: loaded %+v", format, loaded)
			}
			other, err := Open(s.dir)
			if err != nil {
				t.Fatal(err)
			}
			if listed, err := other.Images(t.Context()); err != nil || !cmp.Equal(listed, loaded) {
				t.Errorf("%s: Images: %+v, %v", format, listed, err)
			}
			for _, ref := range []string{"localhost/choiros/test:v1", "choiros/test:v1", loaded[0].ID, loaded[0].Digest, hexOf(loaded[0].ID)[:12]} {
				got, err := other.Resolve(t.Context(), ref, runtime.GOARCH)
				want := Resolved{
					Digest: loaded[0].Digest, ID: loaded[0].ID, Names: loaded[0].Names, Architecture: runtime.GOARCH,
					Entrypoint: []string{"/workload"}, Cmd: []string{"sleep"}, Env: []string{"PATH=/"}, User: "1000", WorkingDir: "/",
				}
				if diff := cmp.Diff(want, got); err != nil || diff != "" {
					t.Errorf("%s: Resolve(%s): %v\n%s", format, ref, err, diff)
				}
			}
			path, err := s.Root(t.Context(), loaded[0].Digest, nil)
			if err != nil {
				t.Fatal(err)
			}
			lines := list(t, path)
			check(t, path, lines)
			if len(lines) != 8 {
				t.Errorf("%s: root has %q", format, lines)
			}
			if err := s.RemoveImage(t.Context(), loaded[0].ID, func(digest string) bool { return digest == loaded[0].Digest }); !errors.Is(err, sandbox.ErrState) {
				t.Errorf("removing one in use: %v", err)
			}
			if err := s.RemoveImage(t.Context(), loaded[0].ID, free); err != nil {
				t.Errorf("RemoveImage: %v", err)
			}
			for _, gone := range []string{"localhost/choiros/test:v1", loaded[0].ID, "localhost/no/such:image"} {
				if err := s.RemoveImage(t.Context(), gone, free); !errors.Is(err, sandbox.ErrNotFound) {
					t.Errorf("removing %s, which is absent: %v", gone, err)
				}
				if _, err := s.Resolve(t.Context(), gone, "amd64"); !errors.Is(err, sandbox.ErrNotFound) {
					t.Errorf("resolving %s, which is absent: %v", gone, err)
				}
			}
			if _, err := s.Root(t.Context(), loaded[0].Digest, nil); !errors.Is(err, sandbox.ErrNotFound) {
				t.Errorf("Root of one that is absent: %v", err)
			}
			if left := filesOf(t, s); !slices.Equal(left, []string{"index.json", "oci-layout"}) {
				t.Errorf("left %v", left)
			}
		}
	}
}

func TestFolderIsPrivate(t *testing.T) {
	t.Parallel()
	s := open(t)
	load(t, s, archiveOf(t, spec{name: "a/b", layers: [][]byte{layerOf(t, text("f", "x"))}}))
	err := filepath.WalkDir(s.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestNamesAreThoseOfPodman(t *testing.T) {
	t.Parallel()
	for given, want := range map[string]string{
		"alpine":                  "docker.io/library/alpine:latest",
		"alpine:3":                "docker.io/library/alpine:3",
		"user/app":                "docker.io/user/app:latest",
		"localhost/x/y":           "localhost/x/y:latest",
		"127.0.0.1:5000/x":        "127.0.0.1:5000/x:latest",
		"quay.io/a/b:c":           "quay.io/a/b:c",
		"index.docker.io/alpine":  "docker.io/library/alpine:latest",
		"a:t@" + digestOf(nil):    "docker.io/library/a@" + digestOf(nil),
		"case/UPPER":              "",
		"/etc/passwd":             "",
		"oci-archive:/etc/passwd": "",
		"":                        "",
		strings.Repeat("a", 300):  "",
	} {
		if got, err := normalize(given); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v; want %q", given, got, err, want)
		}
	}
	s := open(t)
	layer := layerOf(t, text("f", "x"))
	load(t, s, archiveOf(t, spec{name: "short", layers: [][]byte{layer}}, spec{name: "docker.io/library/alpine", layers: [][]byte{layerOf(t)}}))
	for _, ref := range []string{"short", "localhost/short:latest", "alpine", "docker.io/alpine", "library/alpine:latest"} {
		if _, err := s.Resolve(t.Context(), ref, "amd64"); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"UPPER", "", "a b"} {
		if _, err := s.Resolve(t.Context(), bad, "amd64"); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestNameMovesToWhatIsLoadedLast(t *testing.T) {
	t.Parallel()
	s := open(t)
	first := load(t, s, archiveOf(t, spec{name: "localhost/a:1", layers: [][]byte{layerOf(t, text("f", "1"))}}))[0]
	if _, err := s.Root(t.Context(), first.Digest, nil); err != nil {
		t.Fatal(err)
	}
	second := load(t, s, archiveOf(t, spec{name: "localhost/a:1", layers: [][]byte{layerOf(t, text("f", "2"))}}))[0]
	if got, err := s.Resolve(t.Context(), "localhost/a:1", "amd64"); err != nil || got.Digest != second.Digest {
		t.Errorf("%+v, %v", got, err)
	}
	// The other goes on without a name: something may run from it.
	if got, err := s.Resolve(t.Context(), first.ID, "amd64"); err != nil || got.Digest != first.Digest || len(got.Names) != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	// Sharing a layer, the two are removed independently.
	if err := s.RemoveImage(t.Context(), first.ID, free); err != nil {
		t.Fatal(err)
	}
	if ok, err := exists(s.root(first.Digest)); ok || err != nil {
		t.Errorf("its root file system is still there (%v)", err)
	}
	if _, err := s.Root(t.Context(), second.Digest, nil); err != nil {
		t.Error(err)
	}
}

func TestRemovingOneOfSeveralNamesKeepsTheImage(t *testing.T) {
	t.Parallel()
	s := open(t)
	layer := layerOf(t, text("f", "1"))
	load(t, s, archiveOf(t, spec{name: "localhost/a:1", layers: [][]byte{layer}}, spec{name: "localhost/a:2", layers: [][]byte{layer}}))
	images, err := s.Images(t.Context())
	if err != nil || len(images) != 1 || !slices.Equal(images[0].Names, []string{"localhost/a:1", "localhost/a:2"}) {
		t.Fatalf("%+v, %v", images, err)
	}
	if err := s.RemoveImage(t.Context(), images[0].ID, free); !errors.Is(err, sandbox.ErrState) || !strings.Contains(err.Error(), "localhost/a:2") {
		t.Errorf("by its id: %v", err)
	}
	busy := func(string) bool { return true }
	if err := s.RemoveImage(t.Context(), "localhost/a:1", busy); err != nil {
		t.Error(err)
	}
	if _, err := s.Resolve(t.Context(), "localhost/a:2", "amd64"); err != nil {
		t.Error(err)
	}
	if err := s.RemoveImage(t.Context(), "localhost/a:2", busy); !errors.Is(err, sandbox.ErrState) {
		t.Errorf("the last name of one in use: %v", err)
	}
}

func TestSharedLayersStay(t *testing.T) {
	t.Parallel()
	s := open(t)
	base := layerOf(t, text("base", "1"))
	a := spec{name: "localhost/a", layers: [][]byte{base, layerOf(t, text("a", "1"))}}
	b := spec{name: "localhost/b", layers: [][]byte{base, layerOf(t, text("b", "1"))}}
	load(t, s, archiveOf(t, a, b))
	if err := s.RemoveImage(t.Context(), "localhost/a", free); err != nil {
		t.Fatal(err)
	}
	blobs, _ := b.blobsOf(t)
	var want []string
	for digest := range blobs {
		want = append(want, "blobs/sha256/"+hexOf(digest))
	}
	want = append(want, "index.json", "oci-layout")
	slices.Sort(want)
	if diff := cmp.Diff(want, filesOf(t, s)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestLoadOfTheCorruptAddsNothing(t *testing.T) {
	t.Parallel()
	for _, format := range []testimage.Format{testimage.OCI, testimage.Docker} {
		archive := projectImage(t, "localhost/choiros/test:v1", format)
		s := open(t)
		empty := []string{"oci-layout"}
		wantNone := func(what string) {
			t.Helper()
			if left := filesOf(t, s); !slices.Equal(left, empty) {
				t.Errorf("%s: left %v", what, left)
			}
		}
		wantCorrupt := func(what string, archive []byte) {
			t.Helper()
			_, err := s.LoadImage(t.Context(), bytes.NewReader(archive))
			wrong, ok := errors.AsType[*sandbox.FieldError](err)
			if !ok || wrong.Field != archiveField || !errors.Is(err, sandbox.ErrCorrupt) {
				t.Errorf("%s, %s: %v, want corrupt", format, what, err)
			}
			wantNone(what)
		}
		packed := gzipped(t, archive)
		for cut := 0; cut < len(archive)-512; cut += 487 {
			wantCorrupt(fmt.Sprintf("cut at %d", cut), archive[:cut])
		}
		for cut := 0; cut < len(packed); cut += 197 {
			wantCorrupt(fmt.Sprintf("zipped, cut at %d", cut), packed[:cut])
		}
		files := items(t, archive)
		for i, f := range files {
			if len(f.content) == 0 || f.Name == "oci-layout" || f.Name == "repositories" {
				continue
			}
			missing := slices.Delete(slices.Clone(files), i, i+1)
			wantCorrupt("without "+f.Name, layerOf(t, missing...))
			wantCorrupt(f.Name+" twice", layerOf(t, append(slices.Clone(files), f)...))
			if strings.HasSuffix(f.Name, ".json") || format == testimage.Docker && strings.HasPrefix(f.Name, "sha256:") {
				continue // nothing says what its content was
			}
			for _, at := range []int{0, len(f.content) / 2, len(f.content) - 2} {
				changed := slices.Clone(files)
				b := []byte(f.content)
				b[at] ^= 0x20
				changed[i].content = string(b)
				wantCorrupt(fmt.Sprintf("%s changed at %d", f.Name, at), layerOf(t, changed...))
			}
		}

		gone := errors.New("the client has gone")
		_, err := s.LoadImage(t.Context(), io.MultiReader(bytes.NewReader(archive[:len(archive)/2]), iotest.ErrReader(gone)))
		if !errors.Is(err, gone) || errors.Is(err, sandbox.ErrCorrupt) {
			t.Errorf("%v, want the reader's error", err)
		}
		wantNone("a client that went")
		ctx, cancel := context.WithCancel(t.Context())
		endless := io.MultiReader(bytes.NewReader(archive[:1000]), readerFunc(func([]byte) (int, error) {
			cancel()
			return 0, nil
		}))
		if _, err := s.LoadImage(ctx, endless); !errors.Is(err, context.Canceled) {
			t.Errorf("a cancelled load: %v", err)
		}
		wantNone("cancelled")
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// items returns the entries of an archive.
func items(t testing.TB, archive []byte) (all []item) {
	t.Helper()
	r := tar.NewReader(bytes.NewReader(archive))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, item{*h, string(content)})
	}
}

func TestLoadRefusesOtherThings(t *testing.T) {
	t.Parallel()
	s := open(t)
	own, d := spec{layers: [][]byte{layerOf(t)}}.blobsOf(t)
	artifact := []byte(`{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"` + digestOf([]byte("{}")) + `","size":2},"layers":[]}`)
	own[digestOf(artifact)], own[digestOf([]byte("{}"))] = artifact, []byte("{}")
	artifactIndex := v1.IndexManifest{Manifests: []v1.Descriptor{{Size: int64(len(artifact)), Digest: v1.Hash{Algorithm: "sha256", Hex: hexOf(digestOf(artifact))}}}}
	badName := v1.IndexManifest{Manifests: []v1.Descriptor{d}}
	badName.Manifests[0].Annotations = map[string]string{nameAnnotation: "NO NAME"}
	for name, tc := range map[string]struct {
		archive []byte
		want    error
	}{
		"nothing":                 {nil, sandbox.ErrCorrupt},
		"text":                    {[]byte(strings.Repeat("no archive at all\n", 100)), sandbox.ErrCorrupt},
		"some tar":                {layerOf(t, text("README", "hello")), sandbox.ErrCorrupt},
		"no images":               {layerOf(t, text("manifest.json", "[]")), sandbox.ErrCorrupt},
		"malformed manifest":      {layerOf(t, text("manifest.json", "[{")), sandbox.ErrCorrupt},
		"manifest of nothing":     {layerOf(t, text("manifest.json", `[{"Config":"x.json","Layers":["a"]}]`)), sandbox.ErrCorrupt},
		"index of nothing":        {layerOf(t, text("oci-layout", "{}"), text("index.json", `{"manifests":[{"digest":"`+digestOf(nil)+`","size":1}]}`)), sandbox.ErrCorrupt},
		"blob of another name":    {layerOf(t, text("blobs/sha256/"+strings.Repeat("0", 64), "x")), sandbox.ErrCorrupt},
		"gzip of text":            {gzipped(t, []byte("text")), sandbox.ErrCorrupt},
		"xz":                      {[]byte("\xfd7zXZ\x00rest"), sandbox.ErrUnsupported},
		"zstd":                    {[]byte("\x28\xb5\x2f\xfdrest"), sandbox.ErrUnsupported},
		"artifact":                {layoutOf(t, artifactIndex, own), sandbox.ErrUnsupported},
		"no name":                 {layoutOf(t, badName, own), sandbox.ErrCorrupt},
		"too many layers":         {archiveOf(t, spec{layers: manyLayers(maxLayers + 1)}), sandbox.ErrInvalid},
		"a large document":        {layerOf(t, text("oci-layout", "{}"), text("index.json", strings.Repeat(" ", maxDocument+1))), sandbox.ErrCorrupt},
		"a link in a circle":      {layerOf(t, soft("a", "b"), soft("b", "a"), text("manifest.json", `[{"Config":"a"}]`)), sandbox.ErrCorrupt},
		"a link out of it":        {layerOf(t, soft("a", "../../etc/passwd"), text("manifest.json", `[{"Config":"a"}]`)), sandbox.ErrCorrupt},
		"a path out of the stage": {layerOf(t, text("../../../x", "x"), text("manifest.json", `[{"Config":"../../../x"}]`)), sandbox.ErrCorrupt},
	} {
		_, err := s.LoadImage(t.Context(), bytes.NewReader(tc.archive))
		if wrong, ok := errors.AsType[*sandbox.FieldError](err); !ok || wrong.Field != archiveField || !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	if left := filesOf(t, s); !slices.Equal(left, []string{"oci-layout"}) {
		t.Errorf("left %v", left)
	}
	s.MaxBytes = 100_000
	bomb := gzipped(t, layerOf(t, text("a", strings.Repeat("0", 1_000_000))))
	if _, err := s.LoadImage(t.Context(), bytes.NewReader(bomb)); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a bomb: %v", err)
	}
	bomb = layerOf(t, text("a/layer.tar", string(gzipped(t, make([]byte, 1_000_000)))))
	if _, err := s.LoadImage(t.Context(), bytes.NewReader(bomb)); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a bomb inside: %v", err)
	}
}

func manyLayers(n int) [][]byte {
	layers := make([][]byte, n)
	for i := range layers {
		layers[i] = make([]byte, 1024)
	}
	return layers
}

// docker save of old writes layers as links.
func TestLoadFollowsLinks(t *testing.T) {
	t.Parallel()
	files := items(t, projectImage(t, "localhost/test:v1", testimage.Docker))
	for i, f := range files {
		if strings.Contains(f.Name, ".tar") {
			files[i].Name = "real"
			files = append(files, soft(f.Name, "dir/../real"))
			break
		}
	}
	load(t, open(t), layerOf(t, files...))
}

func TestDamagedImageCountsAsAbsent(t *testing.T) {
	t.Parallel()
	s := open(t)
	archive := archiveOf(t, spec{name: "localhost/a", layers: [][]byte{layerOf(t, text("f", "1"))}})
	image := load(t, s, archive)[0]
	other := load(t, s, archiveOf(t, spec{name: "localhost/b", layers: [][]byte{layerOf(t, text("f", "2"))}}))[0]
	if err := os.WriteFile(s.blob(image.ID), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if images, err := s.Images(t.Context()); err != nil || len(images) != 1 || images[0].ID != other.ID {
		t.Errorf("%+v, %v", images, err)
	}
	if _, err := s.Root(t.Context(), image.Digest, nil); !errors.Is(err, sandbox.ErrCorrupt) {
		t.Errorf("%v", err)
	}
	load(t, s, archive) // that mends it
	if _, err := s.Root(t.Context(), image.Digest, nil); err != nil {
		t.Error(err)
	}
}

func TestUnreadableIndexIsRefused(t *testing.T) {
	t.Parallel()
	s := open(t)
	if err := os.WriteFile(s.path("index.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(s.dir); !errors.Is(err, sandbox.ErrCorrupt) || !strings.Contains(err.Error(), "index.json") {
		t.Errorf("%v", err)
	}
}
