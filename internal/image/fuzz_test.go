package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/choiros/agent/internal/sandbox"
	testimage "github.com/choiros/agent/test/image"
)

// FuzzMerge merges two layers of a stranger's and writes what comes out. That
// is refused for a reason that is known, or it can be read back whole.
func FuzzMerge(f *testing.F) {
	f.Add(layerOf(f, text("a/b", "1"), dir("c"), soft("s", "a")), layerOf(f, text("a/.wh.b", ""), hard("c/d", "s"), text("a/.wh..wh..opq", "")))
	f.Add(layerOf(f, text("a", "1"), hard("b", "a")), layerOf(f, text("a", "2").with(xattr(aclAccess, "x")), text("./b/c", "")))
	f.Add(gnuSparse(100_000), layerOf(f, text("../x", "")))
	f.Add(layerOf(f, item{tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1, Devminor: 3}, ""}, hard("d", "c")), layerOf(f, dir(".")))
	f.Fuzz(func(t *testing.T, lower, upper []byte) {
		content, err := os.Create(filepath.Join(t.TempDir(), "content"))
		if err != nil {
			t.Fatal(err)
		}
		defer content.Close()
		tree, sink := newTree(), &scratch{out: bufio.NewWriter(content)}
		files := int64(1 << 20)
		for _, layer := range [][]byte{lower, upper} {
			if err := tree.applyTar(bytes.NewReader(layer), sink, &files); err != nil {
				if !errors.Is(err, sandbox.ErrInvalid) && !errors.Is(err, sandbox.ErrCorrupt) {
					t.Fatal(err)
				}
				return
			}
		}
		if err := sink.out.Flush(); err != nil {
			t.Fatal(err)
		}
		out, err := os.Create(filepath.Join(t.TempDir(), "root"))
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		if err := writeRoot(t.Context(), out, tree, content, digestOf(lower), func(int) {}); err != nil {
			t.Fatal(err)
		}
		want := 1
		tree.root.walk(func(*entry) { want++ })
		if got := list(t, out.Name()); len(got) != want {
			t.Fatalf("%d files were written and %d read: %q", want, len(got), got)
		}
	})
}

// FuzzLoad loads archives of a stranger's: whole, or with a reason and nothing
// that is left.
func FuzzLoad(f *testing.F) {
	for _, format := range []testimage.Format{testimage.OCI, testimage.Docker} {
		archive := projectImage(f, "localhost/test:latest", format)
		f.Add(archive)
		f.Add(gzipped(f, archive))
	}
	f.Add(layerOf(f, soft("a", "b"), text("manifest.json", `[{"Config":"a","RepoTags":["x"],"Layers":["a"]}]`)))
	f.Fuzz(func(t *testing.T, archive []byte) {
		s := open(t)
		s.MaxBytes = 1 << 20
		images, err := s.LoadImage(t.Context(), io.MultiReader(bytes.NewReader(archive)))
		if err != nil {
			if _, ok := errors.AsType[*sandbox.FieldError](err); !ok {
				t.Fatalf("%v is no *FieldError", err)
			}
			if left := filesOf(t, s); len(left) != 1 {
				t.Fatalf("left %v", left)
			}
			return
		}
		for _, image := range images {
			if _, err := s.Resolve(t.Context(), image.Digest, s.Arch); err != nil && !errors.Is(err, sandbox.ErrInvalid) {
				t.Fatal(err)
			}
		}
	})
}
