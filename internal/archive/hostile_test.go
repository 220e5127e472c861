package archive_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/archive"
)

// stream makes a tar stream of headers, with as many bytes as each says.
func stream(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, h := range headers {
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(w, bytes.NewReader(bytes.Repeat([]byte("x"), int(h.Size))), h.Size); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func file(name string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Size: 3}
}

func folder(name string) tar.Header { return tar.Header{Typeflag: tar.TypeDir, Name: name} }

func symlink(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}
}

func hardlink(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}
}

// place is a folder to unpack into, in the middle of what must not change.
func place(t testing.TB) (dest string, unchanged func()) {
	t.Helper()
	outer := t.TempDir()
	dest = filepath.Join(outer, "a", "b", "dest")
	for _, dir := range []string{dest, filepath.Join(outer, "a", "b", "beside"), filepath.Join(outer, "outside")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "canary"), []byte("alive"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	around := func() (all []string) {
		_ = filepath.WalkDir(outer, func(p string, _ fs.DirEntry, err error) error {
			info, statErr := os.Lstat(p)
			if err != nil || statErr != nil {
				return errors.Join(err, statErr)
			}
			if p == dest {
				return fs.SkipDir
			}
			content, _ := os.ReadFile(p)
			all = append(all, p+" "+info.Mode().String()+" "+info.ModTime().String()+" "+string(content))
			return nil
		})
		return all
	}
	before := around()
	return dest, func() {
		t.Helper()
		if diff := cmp.Diff(before, around()); diff != "" {
			t.Errorf("something outside has changed: %s", diff)
		}
	}
}

func TestRefusesWhatLeadsOut(t *testing.T) {
	t.Parallel()
	for name, headers := range map[string][]tar.Header{
		"absolute":                {file("/outside/x")},
		"parent":                  {file("../x")},
		"parent inside":           {file("a/../../x")},
		"zero name":               {{Typeflag: tar.TypeReg, Name: "", Size: 3}},
		"the folder itself":       {file(".")},
		"long":                    {file(strings.Repeat("long/", 20_000) + "x")},
		"deep":                    {file(strings.Repeat("d/", 300) + "x")},
		"absolute link":           {symlink("l", "/etc")},
		"link up":                 {symlink("l", "../beside")},
		"link up from below":      {symlink("d/l", "../../beside")},
		"link with .. in it":      {folder("d"), symlink("l", "d/../../beside")},
		"file through link":       {folder("d"), symlink("l", "d"), file("l/x")},
		"folder through link":     {folder("d"), symlink("l", "d"), folder("l")},
		"folder replaced by link": {folder("d"), symlink("d", "e"), file("d/x")},
		"hard link out":           {hardlink("h", "../../outside/canary")},
		"hard link absolute":      {hardlink("h", "/etc/passwd")},
		"hard link to folder":     {folder("d"), hardlink("h", "d")},
		"hard link through link":  {folder("d"), file("d/x"), symlink("l", "d"), hardlink("h", "l/x")},
		"device":                  {{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3}},
		"block device":            {{Typeflag: tar.TypeBlock, Name: "sda", Devmajor: 8}},
		"pipe":                    {{Typeflag: tar.TypeFifo, Name: "pipe"}},
		"file over folder":        {folder("d"), file("d")},
		"folder over file":        {file("d"), folder("d")},
		"file below file":         {file("d"), file("d/x")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dest, unchanged := place(t)
			_, err := unpack(t, stream(t, headers...), dest, archive.UnpackOptions{})
			if !errors.Is(err, archive.ErrRefused) {
				t.Errorf("got %v", err)
			}
			unchanged()
			noTemps(t, dest)
		})
	}
}

// noTemps asks that no incomplete file is left.
func noTemps(t testing.TB, dir string) {
	t.Helper()
	_ = filepath.WalkDir(dir, func(p string, _ fs.DirEntry, _ error) error {
		if strings.Contains(p, ".unpack-") {
			t.Errorf("%s is left", p)
		}
		return nil
	})
}

// A link may point anywhere inside a sandbox, but nothing is written through
// one that leads out of the folder.
func TestAnyLinksAreNotFollowedOutside(t *testing.T) {
	t.Parallel()
	for _, target := range []string{"../beside", "/", "d/../../beside", "chain"} {
		dest, unchanged := place(t)
		_, err := unpack(t, stream(t, folder("d"), symlink("chain", "../beside"), symlink("l", target), file("l/canary")),
			dest, archive.UnpackOptions{AnyLinks: true})
		if !errors.Is(err, archive.ErrRefused) {
			t.Errorf("%s: got %v", target, err)
		}
		unchanged()
	}
	for _, header := range []tar.Header{folder("l"), hardlink("h", "l/canary")} {
		dest, unchanged := place(t)
		if _, err := unpack(t, stream(t, symlink("l", "../beside"), header), dest, archive.UnpackOptions{AnyLinks: true}); err == nil {
			t.Errorf("%v was taken", header)
		}
		unchanged()
	}
	dest, _ := place(t)
	_, err := unpack(t, stream(t, folder("usr/lib"), symlink("lib", "usr/lib"), file("lib/x"), folder("lib")), dest, archive.UnpackOptions{AnyLinks: true})
	check(t, err)
	if _, err := os.Stat(filepath.Join(dest, "usr", "lib", "x")); err != nil {
		t.Error(err)
	}
}

func TestRenameKeepsAllUnderOneName(t *testing.T) {
	t.Parallel()
	dest, unchanged := place(t)
	_, err := unpack(t, stream(t, folder("work"), file("work/x"), file(".profile/y"), file("canary/z"), hardlink("work/h", "other/x")),
		dest, archive.UnpackOptions{Rename: "copy"})
	check(t, err)
	unchanged()
	entries, err := os.ReadDir(dest)
	check(t, err)
	if len(entries) != 2 || entries[0].Name() != "canary" || entries[1].Name() != "copy" {
		t.Errorf("got %v", entries)
	}
	for _, rename := range []string{"..", "a/b", "/", "a\x00"} {
		if _, err := unpack(t, stream(t), dest, archive.UnpackOptions{Rename: rename}); !errors.Is(err, archive.ErrRefused) {
			t.Errorf("%q: got %v", rename, err)
		}
	}
	for target, want := range map[string]bool{"x": true, "../x": false, "s/x": true} {
		_, err := unpack(t, stream(t, symlink("work/l", target)), dest, archive.UnpackOptions{Rename: "copy"})
		if (err == nil) != want {
			t.Errorf("link to %s: got %v", target, err)
		}
	}
}

func TestLeavesOutLinksIfToldTo(t *testing.T) {
	t.Parallel()
	dest := t.TempDir()
	var skipped []string
	_, err := unpack(t, stream(t, symlink("python", "/usr/bin/python3"), file("x")), dest, archive.UnpackOptions{
		Skipped: func(name, _ string) { skipped = append(skipped, name) },
	})
	check(t, err)
	if len(skipped) != 1 || skipped[0] != "python" {
		t.Errorf("got %q", skipped)
	}
	entries, _ := os.ReadDir(dest)
	if len(entries) != 1 || entries[0].Name() != "x" {
		t.Errorf("got %v", entries)
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	bomb := sparseBomb(t)
	for name, c := range map[string]struct {
		stream  []byte
		options archive.UnpackOptions
	}{
		"bytes":           {stream(t, file("a"), file("b")), archive.UnpackOptions{MaxBytes: 5}},
		"files":           {stream(t, file("a"), file("b")), archive.UnpackOptions{MaxFiles: 1}},
		"implied folders": {stream(t, file("a/b/c/d/e")), archive.UnpackOptions{MaxFiles: 4}},
		"sparse bomb":     {bomb, archive.UnpackOptions{MaxBytes: 1 << 30}},
		"long trailer":    {append(stream(t, file("a")), make([]byte, 2<<20)...), archive.UnpackOptions{}},
	} {
		dest := t.TempDir()
		if _, err := unpack(t, c.stream, dest, c.options); !errors.Is(err, archive.ErrLimit) {
			t.Errorf("%s: got %v", name, err)
		}
		noTemps(t, dest)
	}
}

// sparseBomb is a small stream of a file of 1 TiB.
func sparseBomb(t testing.TB) []byte {
	t.Helper()
	name := filepath.Join(t.TempDir(), "bomb")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 40); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := archive.Pack(t.Context(), &out, name, "bomb", archive.PackOptions{}); err != nil {
		t.Fatal(err)
	}
	if out.Len() > 16<<10 {
		t.Fatalf("%d bytes for a hole", out.Len())
	}
	return out.Bytes()
}

func TestSparseBombStopsWithItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	dest := t.TempDir()
	root, err := os.OpenRoot(dest)
	check(t, err)
	defer root.Close()
	_, err = archive.Unpack(ctx, bytes.NewReader(sparseBomb(t)), root, archive.UnpackOptions{})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	noTemps(t, dest)
}

// endless gives one header again and again.
type endless struct{ block, rest []byte }

func (e *endless) Read(p []byte) (int, error) {
	if len(e.rest) == 0 {
		e.rest = e.block
	}
	n := copy(p, e.rest)
	e.rest = e.rest[n:]
	return n, nil
}

func TestExtensionsWithoutAFileEnd(t *testing.T) {
	t.Parallel()
	long := stream(t, tar.Header{Typeflag: tar.TypeReg, Name: "x", PAXRecords: map[string]string{"VENDOR.x": strings.Repeat("y", 100_000)}})
	block := long[:len(long)-3*512] // but for the file itself and the archive's end
	root, err := os.OpenRoot(t.TempDir())
	check(t, err)
	defer root.Close()
	_, err = archive.Unpack(t.Context(), &endless{block: block}, root, archive.UnpackOptions{})
	if !errors.Is(err, archive.ErrLimit) {
		t.Errorf("got %v", err)
	}
}

func TestCutStreamLeavesNoTemporaryFile(t *testing.T) {
	t.Parallel()
	whole := stream(t, file("first"), tar.Header{Typeflag: tar.TypeReg, Name: "second", Size: 200_000})
	dest := t.TempDir()
	_, err := unpack(t, whole[:100_000], dest, archive.UnpackOptions{})
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v", err)
	}
	noTemps(t, dest)
	if _, err := os.Stat(filepath.Join(dest, "first")); err != nil {
		t.Error("what came before is gone: ", err)
	}
	if _, err := os.Stat(filepath.Join(dest, "second")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("half a file was put in place: ", err)
	}
}

func TestReplacesFilesAndMergesFolders(t *testing.T) {
	t.Parallel()
	dest := t.TempDir()
	check(t, os.MkdirAll(filepath.Join(dest, "d"), 0o755))
	check(t, os.WriteFile(filepath.Join(dest, "d", "old"), []byte("old"), 0o600))
	check(t, os.WriteFile(filepath.Join(dest, "d", "kept"), []byte("kept"), 0o600))
	check(t, os.Symlink("kept", filepath.Join(dest, "d", "link")))
	check(t, os.Chmod(filepath.Join(dest, "d"), 0o555))
	_, err := unpack(t, stream(t, folder("d"), file("d/old"), file("d/link"), folder("d"), symlink("d/old2", "old"), hardlink("d/old2", "d/old"), hardlink("d/old", "d/old")),
		dest, archive.UnpackOptions{})
	check(t, err)
	for name, want := range map[string]string{"old": "xxx", "old2": "xxx", "kept": "kept", "link": "xxx"} {
		got, err := os.ReadFile(filepath.Join(dest, "d", name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	noTemps(t, dest)
}

func TestOddTimesAndModes(t *testing.T) {
	t.Parallel()
	dest := t.TempDir()
	suid := file("suid")
	suid.Mode = 0o7777
	far := tar.Header{Typeflag: tar.TypeReg, Name: "far", Format: tar.FormatPAX, ModTime: time.Unix(1<<60, 0)}
	past := tar.Header{Typeflag: tar.TypeReg, Name: "past", Format: tar.FormatPAX, ModTime: time.Unix(-1<<60, 0)}
	_, err := unpack(t, stream(t, suid, far, past), dest, archive.UnpackOptions{})
	check(t, err)
	info, err := os.Stat(filepath.Join(dest, "suid"))
	if err != nil || info.Mode() != 0o777 {
		t.Errorf("got %v, %v", info.Mode(), err)
	}
}

func FuzzUnpack(f *testing.F) {
	for _, headers := range [][]tar.Header{
		{folder("d"), file("d/x"), symlink("d/l", "x"), hardlink("d/h", "d/x")},
		{symlink("l", "../beside"), file("l/canary")},
		{file("../beside/canary"), file("/outside/canary")},
		{folder("d"), symlink("l", "d/.."), file("l/x"), hardlink("h", "l/../../beside/canary")},
	} {
		f.Add(stream(f, headers...), true, "")
		f.Add(stream(f, headers...), false, "copy")
	}
	f.Add(sparseBomb(f), false, ".")
	f.Fuzz(func(t *testing.T, data []byte, anyLinks bool, rename string) {
		dest, unchanged := place(t)
		root, err := os.OpenRoot(dest)
		check(t, err)
		defer root.Close()
		sum, err := archive.Unpack(t.Context(), bytes.NewReader(data), root, archive.UnpackOptions{
			Rename: rename, AnyLinks: anyLinks, MaxBytes: 1 << 20, MaxFiles: 100,
		})
		if sum.Bytes > 1<<20 || sum.Files > 100 {
			t.Errorf("beyond the limits: %+v", sum)
		}
		unchanged()
		if err == nil {
			noTemps(t, dest)
		}
	})
}
