package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs/go-erofs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"github.com/choiros/agent/internal/sandbox"
)

// item is an entry of a layer.
type item struct {
	tar.Header
	content string
}

// moment is when all of a test's files were changed.
var moment = time.Unix(1_600_000_000, 0)

func text(name, content string) item {
	return item{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: moment}, content}
}

func dir(name string) item {
	return item{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755, ModTime: moment}, ""}
}

func hard(name, target string) item {
	return item{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, ModTime: moment}, ""}
}

func soft(name, target string) item {
	return item{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: moment}, ""}
}

// with changes an entry.
func (i item) with(change func(h *tar.Header)) item {
	change(&i.Header)
	return i
}

// layerOf is a layer, uncompressed.
func layerOf(t testing.TB, items ...item) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, i := range items {
		if i.Typeflag == tar.TypeReg {
			i.Size = int64(len(i.content))
		}
		if err := w.WriteHeader(&i.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, i.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(data)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zstdOf(t testing.TB, data []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(data, nil)
}

// spec is an image that a test makes.
type spec struct {
	name   string
	arch   string // amd64 if empty
	layers [][]byte
	// diffs are what the layers unpack to, if they are compressed.
	diffs  [][]byte
	config v1.Config
}

// blobsOf returns the parts of an image by digest, and what names it.
func (s spec) blobsOf(t testing.TB) (map[string][]byte, v1.Descriptor) {
	t.Helper()
	blobs := map[string][]byte{}
	add := func(content []byte, media types.MediaType) v1.Descriptor {
		digest := digestOf(content)
		blobs[digest] = content
		return v1.Descriptor{MediaType: media, Size: int64(len(content)), Digest: v1.Hash{Algorithm: "sha256", Hex: hexOf(digest)}}
	}
	if s.arch == "" {
		s.arch = "amd64"
	}
	config := v1.ConfigFile{Architecture: s.arch, OS: "linux", Created: v1.Time{Time: moment.UTC()}, Config: s.config}
	manifest := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Layers: []v1.Descriptor{}}
	for i, layer := range s.layers {
		diff := layer
		if s.diffs != nil {
			diff = s.diffs[i]
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, v1.Hash{Algorithm: "sha256", Hex: hexOf(digestOf(diff))})
		manifest.Layers = append(manifest.Layers, add(layer, layerType(layer)))
	}
	manifest.Config = add(encode(t, config), types.OCIConfigJSON)
	return blobs, add(encode(t, manifest), types.OCIManifestSchema1)
}

func encode(t testing.TB, v any) []byte {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// archiveOf is an OCI archive of images.
func archiveOf(t testing.TB, specs ...spec) []byte {
	t.Helper()
	index := v1.IndexManifest{SchemaVersion: 2}
	blobs := map[string][]byte{}
	for _, s := range specs {
		own, d := s.blobsOf(t)
		maps.Copy(blobs, own)
		if s.name != "" {
			d.Annotations = map[string]string{nameAnnotation: s.name}
		}
		index.Manifests = append(index.Manifests, d)
	}
	return layoutOf(t, index, blobs)
}

func layoutOf(t testing.TB, index v1.IndexManifest, blobs map[string][]byte) []byte {
	t.Helper()
	items := []item{text("oci-layout", `{"imageLayoutVersion":"1.0.0"}`), text("index.json", string(encode(t, index)))}
	for _, digest := range slices.Sorted(maps.Keys(blobs)) {
		items = append(items, text("blobs/sha256/"+hexOf(digest), string(blobs[digest])))
	}
	return layerOf(t, items...)
}

func open(t testing.TB) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "images"))
	if err != nil {
		t.Fatal(err)
	}
	s.Arch = "amd64"
	return s
}

func load(t testing.TB, s *Store, archive []byte) []sandbox.Image {
	t.Helper()
	images, err := s.LoadImage(t.Context(), bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	return images
}

// rootOf loads an image of these layers and returns its root file system.
func rootOf(t testing.TB, layers ...[]byte) (string, error) {
	t.Helper()
	s := open(t)
	images := load(t, s, archiveOf(t, spec{name: "localhost/test", layers: layers}))
	path, err := s.Root(t.Context(), images[0].Digest, nil)
	if left, err1 := os.ReadDir(s.temporary()); err1 != nil || len(left) != 0 {
		t.Errorf("tmp holds %v, %v", left, err1)
	}
	return path, err
}

// list describes each file of a root file system in a line, as go-erofs sees it.
func list(t testing.TB, path string) []string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tree, err := erofs.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	first := map[int64]string{}
	var lines []string
	err = fs.WalkDir(tree, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*erofs.Stat)
		seen := line{name: name, mode: st.Mode, uid: st.UID, gid: st.GID, mtime: info.ModTime(), nlink: uint64(st.Nlink), same: first[st.Ino]}
		if !info.IsDir() && seen.same == "" {
			first[st.Ino] = name
		}
		switch info.Mode().Type() {
		case 0:
			content, err := fs.ReadFile(tree, name)
			if err != nil {
				return err
			}
			seen.content = content
		case fs.ModeSymlink:
			if seen.target, err = tree.(interface{ ReadLink(string) (string, error) }).ReadLink(name); err != nil {
				return err
			}
		case fs.ModeDevice, fs.ModeDevice | fs.ModeCharDevice:
			seen.device = st.Rdev
		}
		seen.xattrs = map[string]string{}
		for name, value := range st.Xattrs {
			seen.xattrs[strings.TrimSuffix(name, ".")] = value
		}
		lines = append(lines, seen.String())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// line is what is to be seen of a file.
type line struct {
	name     string
	mode     fs.FileMode
	uid, gid uint32
	mtime    time.Time
	nlink    uint64
	same     string // the first name of the inode
	content  []byte
	target   string
	device   uint32 // as on disk
	xattrs   map[string]string
}

func (l line) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %v %d:%d", l.name, l.mode, l.uid, l.gid)
	if !l.mtime.Equal(moment) {
		fmt.Fprintf(&b, " at %d", l.mtime.UnixNano())
	}
	if l.nlink != 1 && !l.mode.IsDir() {
		fmt.Fprintf(&b, " nlink %d", l.nlink)
	}
	switch {
	case l.same != "":
		fmt.Fprintf(&b, " same as %s", l.same)
	case l.target != "":
		fmt.Fprintf(&b, " -> %s", l.target)
	case l.mode.Type()&fs.ModeDevice != 0:
		fmt.Fprintf(&b, " device %#x", l.device)
	case len(l.content) > 40:
		fmt.Fprintf(&b, " %d bytes %s", len(l.content), digestOf(l.content)[:15])
	case l.mode.IsRegular():
		fmt.Fprintf(&b, " %q", l.content)
	}
	for _, name := range slices.Sorted(maps.Keys(l.xattrs)) {
		fmt.Fprintf(&b, " %s=%q", name, l.xattrs[name])
	}
	return b.String()
}

// brief leaves out what most lines have in common.
func brief(lines []string) []string {
	var short []string
	for _, l := range lines {
		l = strings.Replace(l, " -rw-r--r-- 0:0", "", 1)
		l = strings.Replace(l, " drwxr-xr-x 0:0", "/", 1)
		l = strings.Replace(l, " Lrwxrwxrwx 0:0", "", 1)
		if l == "./ at 0" {
			continue
		}
		short = append(short, l)
	}
	return short
}
