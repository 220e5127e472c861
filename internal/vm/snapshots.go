package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/shim"
)

const (
	// keptSnapshots is how many there are of a disk: the last ones.
	keptSnapshots = 3
	// snapshotID is the form of their names, in UTC. They sort by time.
	snapshotID = "20060102T150405.000000Z"
	// unfinishedCopy is what names of copies begin with that are being made, or
	// were when they were cut short; those that are this old are removed.
	unfinishedCopy = ".unfinished-"
	unfinishedLong = 2 * time.Hour
)

// snapshotsOf is the folder of a disk's snapshots: beside it, where file systems
// that can share blocks do, and kept as long as it is, whatever becomes of the
// sandbox.
func snapshotsOf(image string) string { return image + ".snapshots" }

// SnapshotDisk implements sandbox.Snapshotter.
func (d *Driver) SnapshotDisk(ctx context.Context, ref sandbox.Ref, target string) (sandbox.DiskSnapshot, error) {
	var made sandbox.DiskSnapshot
	err := d.mutate(ctx, ref, func(b shim.Box, _ *shim.Mutex) error {
		image, err := stillDisk(b, target, true)
		if err != nil {
			return err
		}
		dir := snapshotsOf(image)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		before, err := snapshots(image)
		if err != nil {
			return err
		}
		id := time.Now().UTC().Format(snapshotID)
		if err := replaceWithCopy(ctx, filepath.Join(dir, id), image); err != nil {
			return err
		}
		for _, old := range before[min(len(before), keptSnapshots-1):] {
			if err := os.Remove(filepath.Join(dir, old.ID)); err != nil {
				return err
			}
		}
		made, err = snapshotAt(dir, id)
		return err
	})
	return made, failed("snapshot a disk of", ref, err)
}

// DiskSnapshots implements sandbox.Snapshotter.
func (d *Driver) DiskSnapshots(_ context.Context, ref sandbox.Ref, target string) ([]sandbox.DiskSnapshot, error) {
	b, err := d.boxes().Box(ref.ID)
	if err != nil {
		return nil, failed("list snapshots of", ref, err)
	}
	image, err := diskOf(b, target)
	if err != nil {
		return nil, failed("list snapshots of", ref, err)
	}
	found, err := snapshots(image)
	return found, failed("list snapshots of", ref, err)
}

// RestoreDisk implements sandbox.Snapshotter.
func (d *Driver) RestoreDisk(ctx context.Context, ref sandbox.Ref, target, id string) error {
	return failed("restore a disk of", ref, d.mutate(ctx, ref, func(b shim.Box, _ *shim.Mutex) error {
		image, err := stillDisk(b, target, false)
		if err != nil {
			return err
		}
		found, err := snapshots(image)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(found, func(s sandbox.DiskSnapshot) bool { return s.ID == id }) {
			return sandbox.Invalidf("snapshot", "%q is none of this disk's", id)
		}
		// What the machine remembered of the disk is past.
		if err := discardSaved(b); err != nil {
			return err
		}
		return replaceWithCopy(ctx, image, filepath.Join(snapshotsOf(image), id))
	}))
}

// diskOf returns the image that a sandbox has mounted at target; empty: the
// only one that it has.
func diskOf(b shim.Box, target string) (string, error) {
	var p plan
	found, err := b.Made(&p)
	if err != nil {
		return "", err
	}
	if !found {
		return "", sandbox.ErrNotFound
	}
	var targets []string
	for _, disk := range p.Disks {
		if disk.Target == target || target == "" && len(p.Disks) == 1 {
			return disk.Source, nil
		}
		targets = append(targets, disk.Target)
	}
	if len(targets) == 0 {
		return "", fmt.Errorf("%w: it has no disks", sandbox.ErrUnsupported)
	}
	return "", sandbox.Invalidf("target", "say which of its disks: %q", targets)
}

// stillDisk is diskOf, of a disk that nobody writes to and that there is.
func stillDisk(b shim.Box, target string, orPaused bool) (string, error) {
	image, err := diskOf(b, target)
	if err != nil {
		return "", err
	}
	o, _, err := b.Observe()
	switch {
	case err != nil:
		return "", err
	case o.State != sandbox.StateRunning:
		if err := checkUnused(image); err != nil {
			return "", err
		}
	case orPaused && !o.Paused:
		return "", fmt.Errorf("%w: it runs; stop or pause it first", sandbox.ErrState)
	case !orPaused:
		return "", fmt.Errorf("%w: it has the disk mounted; stop it first", sandbox.ErrState)
	}
	return image, nil
}

// checkUnused refuses an image that another machine has, or that is not there.
func checkUnused(image string) error {
	file, err := os.OpenFile(image, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %s is made at the first start", sandbox.ErrState, image)
	}
	if err != nil {
		return err
	}
	defer file.Close()
	used, err := isLocked(file)
	if err == nil && used {
		err = fmt.Errorf("%w: another machine has %s", sandbox.ErrState, image)
	}
	return err
}

// snapshots lists those of an image, the latest first.
func snapshots(image string) ([]sandbox.DiskSnapshot, error) {
	dir := snapshotsOf(image)
	entries, err := os.ReadDir(dir) // sorted
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var found []sandbox.DiskSnapshot
	for _, entry := range slices.Backward(entries) {
		s, err := snapshotAt(dir, entry.Name())
		if err != nil {
			continue // something else, or just removed
		}
		found = append(found, s)
	}
	return found, nil
}

func snapshotAt(dir, id string) (sandbox.DiskSnapshot, error) {
	at, err := time.Parse(snapshotID, id)
	if err != nil {
		return sandbox.DiskSnapshot{}, err
	}
	info, err := os.Stat(filepath.Join(dir, id))
	if err != nil {
		return sandbox.DiskSnapshot{}, err
	}
	return sandbox.DiskSnapshot{ID: id, CreatedAt: at, SizeBytes: uint64(info.Size())}, nil //nolint:gosec // Not negative.
}

// replaceWithCopy makes to a copy of from, all or nothing.
func replaceWithCopy(ctx context.Context, to, from string) error {
	old, _ := filepath.Glob(filepath.Join(filepath.Dir(to), unfinishedCopy+"*")) // or they stay, if the path is a pattern itself
	for _, path := range old {
		if info, err := os.Stat(path); err == nil && time.Since(info.ModTime()) > unfinishedLong {
			_ = os.Remove(path)
		}
	}
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	// Of this copy alone: two sandboxes may have the same disk.
	target, err := os.CreateTemp(filepath.Dir(to), unfinishedCopy)
	if err != nil {
		return err
	}
	unfinished := target.Name()
	if err = clone(target, source); err != nil {
		err = copySparse(ctx, target, source)
	}
	if err == nil {
		err = target.Sync()
	}
	err = errors.Join(err, target.Close())
	if err == nil {
		err = os.Rename(unfinished, to)
	}
	if err != nil {
		return errors.Join(err, os.Remove(unfinished))
	}
	dir, err := os.Open(filepath.Dir(to))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// copyBlock is how much is read at a time, and how long a run of zeros has to
// be to become a hole.
const copyBlock = 64 << 10

// copySparse copies what is not a hole, and makes holes of zeros.
func copySparse(ctx context.Context, to, from *os.File) error {
	info, err := from.Stat()
	if err != nil {
		return err
	}
	if err := to.Truncate(info.Size()); err != nil {
		return err
	}
	zeros, block := make([]byte, copyBlock), make([]byte, copyBlock)
	for at := int64(0); at < info.Size(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, end, err := nextData(from, at, info.Size())
		if err != nil || data == end {
			return err
		}
		for at = data; at < end; {
			n, err := from.ReadAt(block[:min(copyBlock, end-at)], at)
			if err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			if n == 0 {
				return io.ErrUnexpectedEOF // it became shorter
			}
			if string(block[:n]) != string(zeros[:n]) {
				if _, err := to.WriteAt(block[:n], at); err != nil {
					return err
				}
			}
			at += int64(n)
			if err := ctx.Err(); err != nil {
				return err
			}
		}
	}
	return nil
}
