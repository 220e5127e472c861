package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
)

// UnpackOptions say how to unpack. The zero value is for a stream of an
// enemy's onto a person's machine, but for Rename, which that needs too.
type UnpackOptions struct {
	// Rename is what the first element of each name, and of each hard link's
	// target, becomes; "." leaves that element out. Empty: names stay. With it
	// all goes to that one name in the folder: without, a stream that was to
	// bring "work" may bring ".profile" as well.
	Rename string
	// Owners gives files the numeric owners in the stream, which takes privilege.
	// Otherwise they are the caller's.
	Owners bool
	// SetID keeps the bits of setuid, setgid and sticky.
	SetID bool
	// AnyLinks makes symbolic links whatever they point to, and goes through
	// those in the way to a file as long as they stay in the folder. Otherwise
	// a link that is absolute or leads out of what is unpacked, and a file
	// behind a link, are refused.
	AnyLinks bool
	// Skipped, if not nil, is told of the links that AnyLinks would have let
	// pass, which are then left out instead of ending it all.
	Skipped func(name, why string)
	// MaxBytes limits the sizes of all files together, their holes included,
	// and MaxFiles the number of entries and of folders above them. 0: no limit.
	MaxBytes, MaxFiles int64
}

// Summary is what was unpacked.
type Summary struct {
	Files int64 // entries: files, folders and links
	Bytes int64 // in files, holes included
}

// Unpack makes the files of a tar stream in a folder, and nothing outside of
// it. It reads r to its end.
//
// A file is complete before it takes the place of another; a folder that is
// there is filled further, and never replaced by anything else. Folders get
// their modes and times after their contents; the folder itself keeps its own.
// Runs of zeros become holes. Devices and pipes are refused.
//
// An error names the entry that it is about; what was unpacked before stays.
// It wraps ErrRefused, ErrLimit, tar.ErrHeader, io.ErrUnexpectedEOF for a
// stream that is cut off, ctx's error, or one of the file system's.
func Unpack(ctx context.Context, r io.Reader, root *os.Root, options UnpackOptions) (Summary, error) {
	if name := options.Rename; name != "" && (!filepath.IsLocal(name) || strings.ContainsAny(name, "/\x00")) {
		return Summary{}, fmt.Errorf("%w: %s is not the name of a file", ErrRefused, clip(name))
	}
	u := &unpacker{ctx: ctx, root: root, options: options, buffer: make([]byte, bufferSize)}
	defer u.leave()
	err := u.all(r)
	return u.summary, errors.Join(err, u.settle(""))
}

// unpacker is one Unpack at work.
type unpacker struct {
	ctx     context.Context //nolint:containedctx // Lives as long as one call of Unpack.
	root    *os.Root
	options UnpackOptions
	summary Summary
	counted int64    // entries, and folders above them that none was about
	pending []folder // whose modes and times are to be set
	buffer  []byte

	dir string   // the folder that at is
	at  *os.Root // the last one that was written in, or nil
}

func (u *unpacker) all(r io.Reader) error {
	in := &meter{ctx: u.ctx, in: r}
	stream := tar.NewReader(in)
	for {
		in.left = maxHeaders
		header, err := stream.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		in.left = math.MaxInt64
		if err := u.entry(header, stream); err != nil {
			return fmt.Errorf("unpack %s: %w", clip(header.Name), translate(err))
		}
	}
	in.left = maxTrailer + 1
	n, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{in}, u.buffer)
	if n > maxTrailer {
		return fmt.Errorf("%w: more than %d bytes after the end of the archive", ErrLimit, maxTrailer)
	}
	return err
}

// translate recognises what os.Root refuses: the only errors about paths that
// do not come from the system.
func translate(err error) error {
	pathError, ok := errors.AsType[*fs.PathError](err)
	if !ok {
		return err
	}
	if _, ok := errors.AsType[syscall.Errno](pathError.Err); ok || errors.Is(err, fs.ErrClosed) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrRefused, err)
}

// entry makes one entry.
func (u *unpacker) entry(header *tar.Header, data io.Reader) error {
	if header.Typeflag == tar.TypeXGlobalHeader {
		return u.count()
	}
	name, err := u.name(header.Name)
	if err != nil {
		return err
	}
	if err := u.count(); err != nil {
		return err
	}
	if name == "." {
		if header.Typeflag == tar.TypeDir {
			return nil
		}
		return fmt.Errorf("%w: it would take the place of the folder unpacked into", ErrRefused)
	}
	at, err := u.parent(path.Dir(name))
	if err != nil {
		return err
	}
	if err := u.make(at, name, header, data); err != nil {
		return err
	}
	u.summary.Files++
	return nil
}

func (u *unpacker) make(at *os.Root, name string, header *tar.Header, data io.Reader) error {
	if header.Typeflag == tar.TypeDir {
		return u.folder(at, name, header)
	}
	base := path.Base(name)
	if info, err := at.Lstat(base); err == nil && info.IsDir() {
		return fmt.Errorf("%w: %s is a folder here, and no folder in the archive", ErrRefused, clip(name))
	}
	switch header.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		return u.file(at, base, header, data)
	case tar.TypeSymlink:
		return u.symlink(at, name, header)
	case tar.TypeLink:
		return u.link(name, header)
	}
	return fmt.Errorf("%w: it is no file, folder or link (type %q)", ErrRefused, header.Typeflag)
}

// count counts what costs something, before it does.
func (u *unpacker) count() error {
	u.counted++
	if limit := u.options.MaxFiles; limit > 0 && u.counted > limit {
		return fmt.Errorf("%w: more than %d files", ErrLimit, limit)
	}
	return nil
}

// name returns a name of the stream as one below the root: clean, and "." for
// the root itself.
func (u *unpacker) name(name string) (string, error) {
	switch {
	case name == "":
		return "", fmt.Errorf("%w: a name is empty", ErrRefused)
	case len(name) > maxPath:
		return "", fmt.Errorf("%w: a name has more than %d bytes", ErrRefused, maxPath)
	case strings.ContainsRune(name, 0):
		return "", fmt.Errorf("%w: a name has a zero byte", ErrRefused)
	case path.IsAbs(name):
		return "", fmt.Errorf("%w: the name %s is absolute", ErrRefused, clip(name))
	}
	for element := range strings.SplitSeq(name, "/") {
		if element == ".." {
			return "", fmt.Errorf("%w: the name %s leads out of the folder", ErrRefused, clip(name))
		}
	}
	if u.options.Rename != "" {
		_, rest, _ := strings.Cut(name, "/")
		name = u.options.Rename + "/" + rest
	}
	name = path.Clean(name)
	if !filepath.IsLocal(name) || strings.Count(name, "/") > maxDepth {
		return "", fmt.Errorf("%w: the name %s cannot be used", ErrRefused, clip(name))
	}
	return name, nil
}

// parent returns a folder to write in, which it makes if there is none. It
// stays open until another is asked for.
func (u *unpacker) parent(dir string) (*os.Root, error) {
	if u.at != nil && u.dir == dir {
		return u.at, nil
	}
	u.leave()
	enter := u.walk
	if u.options.AnyLinks {
		enter = u.reach
	}
	at, err := enter(dir)
	if err != nil {
		return nil, err
	}
	u.dir, u.at = dir, at
	return at, nil
}

// leave forgets the folder that was written in last: a link may have changed
// what its name means.
func (u *unpacker) leave() {
	if u.at != nil {
		u.at.Close()
		u.at = nil
	}
}

// walk enters a folder through folders alone.
func (u *unpacker) walk(dir string) (*os.Root, error) {
	at, err := u.root.OpenRoot(".")
	if err != nil || dir == "." {
		return at, err
	}
	for element := range strings.SplitSeq(dir, "/") {
		next, err := u.step(at, element)
		at.Close()
		if err != nil {
			return nil, err
		}
		at = next
	}
	return at, nil
}

func (u *unpacker) step(at *os.Root, element string) (*os.Root, error) {
	info, err := at.Lstat(element)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := u.count(); err != nil {
			return nil, err
		}
		if err := at.Mkdir(element, implicit); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	case !info.IsDir():
		return nil, fmt.Errorf("%w: %s is no folder", ErrRefused, clip(element))
	}
	return at.OpenRoot(element)
}

// reach enters a folder through whatever links stay below the root.
func (u *unpacker) reach(dir string) (*os.Root, error) {
	_, err := u.root.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		above, err := u.reach(path.Dir(dir))
		if err != nil {
			return nil, err
		}
		above.Close()
		if err := u.count(); err != nil {
			return nil, err
		}
		if err := u.root.Mkdir(dir, implicit); err != nil {
			return nil, err
		}
	}
	return u.root.OpenRoot(dir)
}
