// Package kit installs the guest kit, what virtual machines that are made from
// images boot with, from a release's archive. docs/guest-kit.md describes both.
//
// An archive is a tar file, compressed with gzip, on this host or behind an
// https URL. Whoever sends it is not trusted: it is unpacked once its SHA-256 is
// known to be the one that was named, below one folder and never outside it, and
// then has nothing in it but what its guest.json names with a checksum.
//
// What it refuses to do: install without a checksum, fetch over plain http, or
// replace a folder that it has not made.
package kit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

const (
	// MaxArchive is the longest archive, in bytes. Kits have about 30 MB.
	MaxArchive = 256 << 20
	// maxKit bounds what it unpacks to, in bytes, and maxFiles the files in it.
	maxKit   = 512 << 20
	maxFiles = 32
	// defaultStall is Options.StallLimit where that is 0.
	defaultStall = time.Minute
)

// Options are what to install, and where.
type Options struct {
	// Source is the archive: the path of a file, or a URL that begins with
	// https://.
	Source string
	// SHA256 is the archive's, in hexadecimal. Empty: the one that a file
	// SHA256SUMS beside the archive has for its name.
	SHA256 string
	// Dir is the folder of kits, made if it is absent: the kit is then in
	// Dir/Arch, a link to a folder beside it.
	Dir string
	// Arch is what guests are here: amd64 or arm64. Kits for others are refused.
	Arch string
	// Progress, if not nil, is told how many bytes of the archive there are, and
	// of how many; 0 if that is not known.
	Progress func(done, of int64)
	// Transport carries https; nil: as this host is configured.
	Transport http.RoundTripper
	// StallLimit is how long a server may send nothing; 0: a minute.
	StallLimit time.Duration
}

// Installed is a kit that was installed.
type Installed struct {
	Path          string            `json:"path"`
	Arch          string            `json:"arch"`
	KernelVersion string            `json:"kernel_version"`
	SHA256        string            `json:"sha256"` // the archive's
	Packages      map[string]string `json:"packages,omitempty"`
}

// Install installs a kit in place of the one that is there, in one step, or
// changes nothing. Machines that run are not concerned.
//
// Errors wrap sandbox.ErrInvalid for what was asked for, ErrCorrupt for an
// archive that is not what it should be, ErrNotFound for one that is not there,
// ErrUnsupported for another architecture's, ErrExhausted for a full disk,
// ErrState while another is being installed, and ErrExists for a folder of
// somebody else's.
func Install(ctx context.Context, o Options) (*Installed, error) {
	installed, err := install(ctx, o)
	for _, full := range []error{syscall.ENOSPC, syscall.EDQUOT} {
		if errors.Is(err, full) {
			err = fmt.Errorf("%w: %w", sandbox.ErrExhausted, err)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("install guest kit %s: %w", shown(o.Source), err)
	}
	return installed, nil
}

func install(ctx context.Context, o Options) (_ *Installed, err error) {
	from, err := sourceOf(o)
	if err != nil {
		return nil, err
	}
	want, err := wantedSum(ctx, from, o.SHA256)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	unlock, err := lock(o.Dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	// Whether it can take its place is asked before anything is fetched.
	if err := replaceable(filepath.Join(o.Dir, o.Arch)); err != nil {
		return nil, err
	}
	archive, sum, err := fetch(ctx, from, o)
	if err != nil {
		return nil, err
	}
	defer archive.Close()
	if sum != want {
		return nil, fmt.Errorf("%w: its SHA-256 is %s and should be %s: it is truncated, or another", sandbox.ErrCorrupt, sum, want)
	}
	dir, err := os.MkdirTemp(o.Dir, o.Arch+"-")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	if err := unpack(ctx, archive, dir); err != nil {
		return nil, err
	}
	m, err := verify(dir, o.Arch)
	if err != nil {
		return nil, err
	}
	path, err := place(o.Dir, o.Arch, filepath.Base(dir))
	if err != nil {
		return nil, err
	}
	return &Installed{Path: path, Arch: m.Arch, KernelVersion: m.KernelVersion, SHA256: sum, Packages: m.Packages}, nil
}

// lock keeps a second installation out of the folder of kits. Whoever dies
// leaves it unlocked: flock(2).
func lock(dir string) (unlock func(), err error) {
	folder, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(folder.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		err = fmt.Errorf("lock %s: %w", dir, err)
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = fmt.Errorf("another is being installed in %s: %w", dir, sandbox.ErrState)
		}
		return nil, errors.Join(err, folder.Close())
	}
	return func() { _ = folder.Close() }, nil // only read from
}

// replaceable refuses what this package did not make.
func replaceable(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSymlink:
		return fmt.Errorf("%s %w and is no kit that was installed: move it away", path, sandbox.ErrExists)
	}
	return nil
}

// place makes Dir/arch lead to a folder beside it, in one step, and removes the
// folders that it led to before.
func place(dir, arch, to string) (string, error) {
	path, link := filepath.Join(dir, arch), filepath.Join(dir, "."+to)
	if err := os.Symlink(to, link); err != nil {
		return "", err
	}
	if err := os.Rename(link, path); err != nil {
		return "", errors.Join(err, os.Remove(link))
	}
	if err := syncDir(dir); err != nil {
		return "", err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	for _, entry := range entries {
		name := strings.TrimPrefix(entry.Name(), ".") // a link that was left behind
		if strings.HasPrefix(name, arch+"-") && entry.Name() != to {
			// It is in nobody's way, and the next one tries again.
			_ = os.RemoveAll(filepath.Join(dir, entry.Name()))
		}
	}
	return path, nil
}

func syncDir(dir string) error {
	folder, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}

// copyTo copies to a file, telling of progress, and no more than MaxArchive.
func copyTo(ctx context.Context, to io.Writer, from io.Reader, of int64, progress func(done, of int64)) error {
	buffer := make([]byte, 256<<10)
	done := int64(0)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := from.Read(buffer)
		if done += int64(n); done > MaxArchive {
			return fmt.Errorf("%w: it is longer than %d bytes", sandbox.ErrCorrupt, int64(MaxArchive))
		}
		if _, err := to.Write(buffer[:n]); err != nil {
			return err
		}
		if progress != nil && n > 0 {
			progress(done, of)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
