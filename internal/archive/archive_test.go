package archive_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/archive"
)

// when is a time with nanoseconds.
var when = time.Date(2021, 3, 4, 5, 6, 7, 123456789, time.UTC)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// tree makes a folder with one of each kind and returns its path.
func tree(t *testing.T) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "tree")
	check(t, os.MkdirAll(filepath.Join(root, "sub", "deep"), 0o755))
	check(t, os.WriteFile(filepath.Join(root, "plain"), []byte("hello"), 0o600))
	check(t, os.WriteFile(filepath.Join(root, "sub", "tool"), []byte("#!"), 0o700))
	check(t, os.Chmod(filepath.Join(root, "sub", "tool"), 0o755|fs.ModeSetuid))
	check(t, os.Symlink("../plain", filepath.Join(root, "sub", "soft")))
	check(t, os.Link(filepath.Join(root, "plain"), filepath.Join(root, "sub", "hard")))
	check(t, os.WriteFile(filepath.Join(root, "sub", "deep", strings.Repeat("é", 100)), nil, 0o644))
	sparse(t, filepath.Join(root, "holes"))
	check(t, syscall.Mkfifo(filepath.Join(root, "pipe"), 0o600))
	for _, name := range []string{"holes", "plain", "sub/tool", "sub/deep", "sub"} {
		check(t, os.Chtimes(filepath.Join(root, name), when, when))
	}
	check(t, os.Chmod(filepath.Join(root, "sub"), 0o555))
	t.Cleanup(func() { os.Chmod(filepath.Join(root, "sub"), 0o755) })
	return root
}

// sparse makes a file of 16 MiB with little in it.
func sparse(t *testing.T, file string) {
	t.Helper()
	f, err := os.Create(file)
	check(t, err)
	defer f.Close()
	for _, at := range []int64{2 << 20, 10<<20 + 17} {
		_, err := f.WriteAt([]byte("island"), at)
		check(t, err)
	}
	check(t, f.Truncate(16<<20))
}

// stored is how many bytes of a file are on disk.
func stored(t *testing.T, file string) int64 {
	t.Helper()
	info, err := os.Stat(file)
	check(t, err)
	return info.Sys().(*syscall.Stat_t).Blocks * 512
}

// look describes what is in a folder.
func look(t *testing.T, root string) []string {
	t.Helper()
	var all []string
	check(t, filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(p)
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		line := fmt.Sprint(rel, " ", info.Mode())
		switch {
		case info.Mode().IsRegular():
			content, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d %x %s links=%d", len(content), strings.Trim(string(content), "\x00"), info.ModTime().UTC(), info.Sys().(*syscall.Stat_t).Nlink)
		case info.IsDir() && rel != ".":
			line += " " + info.ModTime().UTC().String()
		case info.Mode().Type() == fs.ModeSymlink:
			target, _ := os.Readlink(p)
			line += " -> " + target + " " + info.ModTime().UTC().String()
		}
		all = append(all, line)
		return nil
	}))
	return all
}

func pack(t *testing.T, file, name string) []byte {
	t.Helper()
	var out bytes.Buffer
	check(t, archive.Pack(t.Context(), &out, file, name, archive.PackOptions{}))
	return out.Bytes()
}

func unpack(t *testing.T, stream []byte, dir string, options archive.UnpackOptions) (archive.Summary, error) {
	t.Helper()
	root, err := os.OpenRoot(dir)
	check(t, err)
	defer root.Close()
	return archive.Unpack(t.Context(), bytes.NewReader(stream), root, options)
}

func TestRoundTripKeepsEverything(t *testing.T) {
	t.Parallel()
	source := tree(t)
	var stream bytes.Buffer
	var skipped []string
	check(t, archive.Pack(t.Context(), &stream, source, "tree", archive.PackOptions{
		Skipped: func(name, _ string) { skipped = append(skipped, name) },
	}))
	if diff := cmp.Diff([]string{"tree/pipe"}, skipped); diff != "" {
		t.Error(diff)
	}
	if stream.Len() > 1<<20 {
		t.Errorf("the stream has %d bytes: holes were packed as zeros", stream.Len())
	}
	for _, anyLinks := range []bool{false, true} {
		dest := t.TempDir()
		sum, err := unpack(t, stream.Bytes(), dest, archive.UnpackOptions{SetID: true, Rename: "copy", AnyLinks: anyLinks})
		check(t, err)
		if want := (archive.Summary{Files: 9, Bytes: 16<<20 + 5 + 2}); sum != want {
			t.Errorf("got %+v, want %+v", sum, want)
		}
		want := slices.DeleteFunc(look(t, source), func(s string) bool { return strings.HasPrefix(s, "pipe") })
		if diff := cmp.Diff(want, look(t, filepath.Join(dest, "copy"))); diff != "" {
			t.Error(diff)
		}
		if got := stored(t, filepath.Join(dest, "copy", "holes")); got > 1<<20 {
			t.Errorf("%d bytes are stored of a file with holes", got)
		}
		check(t, os.Chmod(filepath.Join(dest, "copy", "sub"), 0o755))
	}
}

func TestGNUTarReadsWhatIsPacked(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("tar"); err != nil {
		t.Fatal("install tar: ", err)
	}
	source, dest := tree(t), t.TempDir()
	command := exec.CommandContext(t.Context(), "tar", "-xp", "--delay-directory-restore", "-C", dest)
	command.Stdin = bytes.NewReader(pack(t, source, "tree"))
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	want := slices.DeleteFunc(look(t, source), func(s string) bool { return strings.HasPrefix(s, "pipe") })
	if diff := cmp.Diff(want, look(t, filepath.Join(dest, "tree"))); diff != "" {
		t.Error(diff)
	}
	if got := stored(t, filepath.Join(dest, "tree", "holes")); got > 1<<20 {
		t.Errorf("%d bytes are stored of a file with holes", got)
	}
	check(t, os.Chmod(filepath.Join(dest, "tree", "sub"), 0o755))
}

func TestReadsWhatGNUTarPacks(t *testing.T) {
	t.Parallel()
	source := tree(t)
	check(t, os.Remove(filepath.Join(source, "pipe")))
	for _, format := range []string{"gnu", "pax"} {
		stream, err := exec.CommandContext(t.Context(), "tar", "-c", "-S", "--format", format, "-C", filepath.Dir(source), "tree").Output()
		check(t, err)
		dest := t.TempDir()
		_, err = unpack(t, stream, dest, archive.UnpackOptions{SetID: true})
		check(t, err)
		names := func(lines []string) (names []string) {
			for _, line := range lines {
				names = append(names, strings.Fields(line)[0])
			}
			return names
		}
		want, got := look(t, source), look(t, filepath.Join(dest, "tree"))
		if format == "gnu" { // has no nanoseconds
			want, got = names(want), names(got)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(format, diff)
		}
		if got := stored(t, filepath.Join(dest, "tree", "holes")); got > 1<<20 {
			t.Errorf("%s: %d bytes are stored of a file with holes", format, got)
		}
		check(t, os.Chmod(filepath.Join(dest, "tree", "sub"), 0o755))
	}
}

func TestSparseFileIsFollowedByOthers(t *testing.T) {
	t.Parallel()
	source, dest := t.TempDir(), t.TempDir()
	for _, name := range []string{"a", "b", "c"} {
		sparse(t, filepath.Join(source, name))
		check(t, os.Truncate(filepath.Join(source, name), 10<<20+20)) // ends within data
	}
	check(t, os.Truncate(filepath.Join(source, "b"), 0))
	check(t, os.Truncate(filepath.Join(source, "b"), 1<<20)) // nothing but a hole
	check(t, os.Chtimes(filepath.Join(source, "b"), when, time.Unix(-2, 500_000_000)))
	_, err := unpack(t, pack(t, source, "."), dest, archive.UnpackOptions{})
	check(t, err)
	if diff := cmp.Diff(look(t, source)[1:], look(t, dest)[1:]); diff != "" {
		t.Error(diff)
	}
}

func TestPackStopsWithItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	writes := 0
	err := archive.Pack(ctx, writerFunc(func(p []byte) (int, error) {
		writes++
		cancel()
		return len(p), nil
	}), dense(t), "big", archive.PackOptions{})
	if !errors.Is(err, context.Canceled) || writes > 1 {
		t.Errorf("got %v after %d writes", err, writes)
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// dense makes a file without holes of 1 MiB.
func dense(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "big")
	check(t, os.WriteFile(file, bytes.Repeat([]byte("x"), 1<<20), 0o600))
	return file
}

func TestFileThatShrinksOrGrowsGivesAValidStream(t *testing.T) {
	t.Parallel()
	for _, size := range []int64{100_000, 2 << 20} {
		file := dense(t)
		var stream bytes.Buffer
		first := true
		check(t, archive.Pack(t.Context(), writerFunc(func(p []byte) (int, error) {
			if first {
				first = false
				check(t, os.Truncate(file, size))
			}
			return stream.Write(p)
		}), file, "big", archive.PackOptions{}))
		dest := t.TempDir()
		sum, err := unpack(t, stream.Bytes(), dest, archive.UnpackOptions{})
		if err != nil || sum.Bytes != 1<<20 {
			t.Errorf("got %+v, %v", sum, err)
		}
	}
}

func TestPackRefusesADeviceByName(t *testing.T) {
	t.Parallel()
	err := archive.Pack(t.Context(), io.Discard, "/dev/zero", "zero", archive.PackOptions{})
	if !errors.Is(err, archive.ErrRefused) {
		t.Errorf("got %v", err)
	}
}

func TestPackFollowsOnlyIfAsked(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	check(t, os.Mkdir(filepath.Join(dir, "real"), 0o755))
	check(t, os.Symlink("real", filepath.Join(dir, "link")))
	for follow, want := range map[bool]byte{true: tar.TypeDir, false: tar.TypeSymlink} {
		var out bytes.Buffer
		check(t, archive.Pack(t.Context(), &out, filepath.Join(dir, "link"), "x", archive.PackOptions{Follow: follow}))
		header, err := tar.NewReader(&out).Next()
		if err != nil || header.Typeflag != want {
			t.Errorf("follow %v: %v %v", follow, header, err)
		}
	}
}
