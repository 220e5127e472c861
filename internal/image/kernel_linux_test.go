package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
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
	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/sandbox"
)

// systemRoles are roles that need mounts of their own.
var systemRoles = map[string]func(args []string) error{
	"mount": mountAndList,
	"small": rootOnSmallDisk,
}

// check has the kernel and fsck.erofs read a file system, where there are
// such, and wants them to see the same lines.
func check(t *testing.T, path string, want []string) {
	t.Helper()
	if fsck, err := exec.LookPath("fsck.erofs"); err == nil {
		if out, err := exec.CommandContext(t.Context(), fsck, "--extract", path).CombinedOutput(); err != nil {
			t.Errorf("fsck.erofs: %v: %s", err, out)
		}
	}
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil || os.Getuid() != 0 || !strings.Contains(string(known), "\terofs\n") {
		return // the same was compared with go-erofs's reader
	}
	cmd := command(t.Context(), "mount", path, t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("mount it: %v: %s", err, out)
		return
	}
	if diff := cmp.Diff(want, strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00")); diff != "" {
		t.Errorf("what the kernel sees (-want +got):\n%s", diff)
	}
}

// mountAndList prints what the kernel sees. It runs in a mount namespace of its
// own, which ends with it.
func mountAndList(args []string) error {
	image, at := args[0], args[1]
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount(image, at, "erofs", unix.MS_RDONLY, ""); err != nil {
		return err
	}
	lines, err := listFolder(at)
	for _, l := range lines {
		fmt.Print(l, "\x00")
	}
	return err
}

// listFolder is list for a folder of the host.
func listFolder(at string) ([]string, error) {
	first := map[uint64]string{}
	var lines []string
	err := filepath.WalkDir(at, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		name, err := filepath.Rel(at, path)
		if err != nil {
			return err
		}
		seen := line{
			name: name, mode: info.Mode(), uid: st.Uid, gid: st.Gid, nlink: uint64(st.Nlink),
			mtime: time.Unix(st.Mtim.Unix()), same: first[st.Ino], xattrs: map[string]string{},
		}
		if !info.IsDir() && seen.same == "" {
			first[st.Ino] = name
		}
		switch info.Mode().Type() {
		case 0:
			if seen.content, err = os.ReadFile(path); err != nil {
				return err
			}
		case fs.ModeSymlink:
			if seen.target, err = os.Readlink(path); err != nil {
				return err
			}
		case fs.ModeDevice, fs.ModeDevice | fs.ModeCharDevice:
			seen.device = deviceNumber(unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		names := make([]byte, 1<<16)
		n, err := unix.Llistxattr(path, names)
		if err != nil {
			return err
		}
		for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
			if name == "" {
				continue
			}
			value := make([]byte, 1<<16)
			n, err := unix.Lgetxattr(path, name, value)
			if err != nil {
				return err
			}
			seen.xattrs[name] = string(value[:n])
		}
		lines = append(lines, seen.String())
		return nil
	})
	return lines, err
}

// What tar makes of layers without whiteouts is what they are to be.
func TestRootIsWhatTarUnpacks(t *testing.T) {
	t.Parallel()
	stack := [][]byte{
		layerOf(t, dir("."), dir("a"), text("a/f", "1"), text("a/g", "2").with(func(h *tar.Header) { h.Mode = 0o4711 }),
			hard("a/h", "a/f"), soft("s", "a/f"), soft("dangling", "no"), dir("empty"), text("k", strings.Repeat("k", 10_000))),
		layerOf(t, text("a/g", "3"), dir("b").with(func(h *tar.Header) { h.Mode = 0o1777 }), hard("b/i", "k"), text("s", "no link now"),
			item{tar.Header{Typeflag: tar.TypeFifo, Name: "p", Mode: 0o600, ModTime: moment}, ""}),
	}
	path, err := rootOf(t, stack...)
	if err != nil {
		t.Fatal(err)
	}
	to := t.TempDir()
	for _, layer := range stack {
		unpack(t, to, layer)
	}
	want, err := listFolder(to)
	if err != nil {
		t.Fatal(err)
	}
	got := list(t, path)
	if diff := cmp.Diff(anybodys(want), anybodys(got)); diff != "" {
		t.Errorf("-tar +root:\n%s", diff)
	}
}

// anybodys leaves out who owns files, since only root can unpack them as
// root's, and the times of folders, which tar changes as it goes on.
func anybodys(lines []string) []string {
	var all []string
	for _, l := range lines {
		fields := strings.Fields(l)
		fields[2] = ""
		if strings.HasPrefix(fields[1], "d") {
			fields = fields[:2]
		}
		all = append(all, strings.Join(fields, " "))
	}
	return all
}

func TestDiskFull(t *testing.T) {
	t.Parallel()
	cmd := command(t.Context(), "small", t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// rootOnSmallDisk has a disk of its own, which is full soon. It is gone with
// the mount namespace.
func rootOnSmallDisk(args []string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("none", args[0], "tmpfs", 0, "size=4m"); err != nil {
		return err
	}
	s, err := Open(filepath.Join(args[0], "images"))
	if err != nil {
		return err
	}
	t := new(testing.T)
	zeros := layerOf(t, text("zeros", string(make([]byte, 10<<20))))
	images, err := s.LoadImage(context.Background(), bytes.NewReader(archiveOf(t, spec{name: "a/b", layers: [][]byte{gzipped(t, zeros)}, diffs: [][]byte{zeros}})))
	if err != nil {
		return err
	}
	before := filesOf(t, s)
	if _, err := s.Root(context.Background(), images[0].Digest, nil); !errors.Is(err, sandbox.ErrExhausted) {
		return fmt.Errorf("convert: %w", err)
	}
	if _, err := s.LoadImage(context.Background(), bytes.NewReader(archiveOf(t, spec{name: "a/c", layers: [][]byte{zeros}}))); !errors.Is(err, sandbox.ErrExhausted) {
		return fmt.Errorf("load: %w", err)
	}
	left, err := os.ReadDir(s.temporary())
	if err != nil || len(left) > 0 || !slices.Equal(before, filesOf(t, s)) {
		return fmt.Errorf("left %v in tmp, and %v of %v: %w", left, filesOf(t, s), before, err)
	}
	return nil
}
