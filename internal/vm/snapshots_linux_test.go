package vm_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/vm/vmtest"
	"github.com/choiros/agent/test/image"
)

// TestDiskSnapshots needs no machine to run: a disk is a file.
func TestDiskSnapshots(t *testing.T) {
	root := vmtest.Backend(t)
	d := open(t, root)
	dir := t.TempDir()
	ref := sandbox.Ref{ID: "disks", Dir: filepath.Join(dir, "ref")}
	disk := filepath.Join(dir, "data.img")
	spec := sandbox.Spec{
		Driver: "vm", Image: image.RootName, Resources: vmtest.Resources(), DriverOptions: json.RawMessage(`{"disk_mib": 64}`),
		Mounts: []sandbox.Mount{{Kind: sandbox.MountDisk, Source: disk, Target: "/data", SizeMiB: 64}},
	}
	if _, err := d.SnapshotDisk(t.Context(), ref, ""); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("of an absent sandbox: %v", err)
	}
	if err := d.Create(t.Context(), ref, spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Delete(context.WithoutCancel(t.Context()), ref); err != nil {
			t.Error(err)
		}
	})
	if _, err := d.SnapshotDisk(t.Context(), ref, ""); !errors.Is(err, sandbox.ErrState) {
		t.Errorf("of a disk that is yet to be made: %v", err)
	}
	write := func(text string) {
		t.Helper()
		file, err := os.OpenFile(disk, os.O_WRONLY|os.O_CREATE, 0o600)
		if err == nil {
			_, err = file.WriteAt([]byte(text), 10<<20)
			err = errors.Join(err, file.Truncate(64<<20), file.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	want := func(text string) {
		t.Helper()
		content, err := os.ReadFile(disk)
		if err != nil || len(content) != 64<<20 || !bytes.HasPrefix(content[10<<20:], []byte(text)) || len(bytes.Trim(content, "\x00")) != len(text) {
			t.Errorf("the disk has %d bytes, %q, %v; want %q", len(content), bytes.Trim(content, "\x00"), err, text)
		}
	}
	var made []sandbox.DiskSnapshot
	for i := range 4 {
		write(fmt.Sprint("state ", i))
		s, err := d.SnapshotDisk(t.Context(), ref, []string{"", "/data"}[i%2])
		if err != nil {
			t.Fatal(err)
		}
		made = append([]sandbox.DiskSnapshot{s}, made...)
	}
	found, err := d.DiskSnapshots(t.Context(), ref, "")
	if err != nil || fmt.Sprint(found) != fmt.Sprint(made[:3]) {
		t.Errorf("the last three are %v; found %v, %v", made[:3], found, err)
	}
	var taken syscall.Stat_t
	if err := syscall.Stat(filepath.Join(disk+".snapshots", made[0].ID), &taken); err != nil || taken.Blocks*512 > 1<<20 {
		t.Errorf("a copy of a few bytes takes %d KiB, %v", taken.Blocks/2, err)
	}
	write("spoilt!")
	if err := d.RestoreDisk(t.Context(), ref, "", made[2].ID); err != nil {
		t.Fatal(err)
	}
	want("state 1")
	if again, err := d.DiskSnapshots(t.Context(), ref, "/data"); err != nil || len(again) != 3 {
		t.Errorf("after restoring there are %v, %v", again, err)
	}

	for what, err := range map[string]error{
		"one that is gone":  d.RestoreDisk(t.Context(), ref, "", made[3].ID),
		"a path":            d.RestoreDisk(t.Context(), ref, "", "../data.img"),
		"another's target":  d.RestoreDisk(t.Context(), ref, "/other", made[0].ID),
		"no disk's target":  func() error { _, err := d.SnapshotDisk(t.Context(), ref, "/other"); return err }(),
		"nothing, by space": d.RestoreDisk(t.Context(), ref, "", " "),
	} {
		if _, ok := errors.AsType[*sandbox.FieldError](err); !ok {
			t.Errorf("%s: %v; want the field that is wrong", what, err)
		}
	}
	// Another machine has it: QEMU locks in this way.
	file, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	lock := unix.Flock_t{Type: unix.F_RDLCK, Start: 100, Len: 1}
	if err := unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		t.Fatal(err)
	}
	if err := d.RestoreDisk(t.Context(), ref, "", made[0].ID); !errors.Is(err, sandbox.ErrState) {
		t.Errorf("restored under another machine: %v", err)
	}
	if _, err := d.SnapshotDisk(t.Context(), ref, ""); !errors.Is(err, sandbox.ErrState) {
		t.Errorf("copied under another machine: %v", err)
	}
	want("state 1")
	if left, _ := filepath.Glob(filepath.Join(dir, "*", ".unfinished*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
