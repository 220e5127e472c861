package files

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"syscall"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

const (
	folderOnly = syscall.O_DIRECTORY
	// atOnce keeps a pipe, or a device, from holding up whoever opens it.
	atOnce = syscall.O_NONBLOCK | syscall.O_NOCTTY

	tempPattern = ".guestd-*" // of files that are not complete
	linkLayers  = 40          // links that point to links
)

// ReadFile serves a call.
func (s *Service) ReadFile(ctx context.Context, conn *wire.Conn, call *guestv1.ReadFile) error {
	if err := check(call.GetPath()); err != nil {
		return err
	}
	offset, err := signed(call.GetOffset(), "offset")
	if err != nil {
		return err
	}
	length, err := signed(call.GetLength(), "length")
	if err != nil {
		return err
	}
	f, info, err := openRegular(call.GetPath())
	if err != nil {
		return translate(err)
	}
	defer f.Close()
	if offset > 0 {
		if _, err := f.Seek(offset, io.SeekStart); err != nil {
			return translate(err)
		}
	}
	// Some of /proc's files wait for what is to come.
	defer context.AfterFunc(ctx, func() { f.Close() })()
	defer conn.Bind(ctx)()
	if err := succeed(conn, &guestv1.Response{Result: &guestv1.Response_File{File: describe(call.GetPath(), info)}}); err != nil {
		return err
	}
	var source io.Reader = f
	if length > 0 {
		source = io.LimitReader(f, length)
	}
	buffer, free := s.buffer()
	defer free()
	if _, err := io.CopyBuffer(conn.Writer(wire.KindData), struct{ io.Reader }{source}, buffer); err != nil {
		return translate(err)
	}
	return finish(conn, &guestv1.Response{})
}

// finish ends a stream of bytes, and says that all went well.
func finish(conn *wire.Conn, response *guestv1.Response) error {
	if err := conn.SendData(wire.KindData, nil); err != nil {
		return err
	}
	return succeed(conn, response)
}

// openRegular opens a file for reading, and nothing else: to open a device can
// do something.
func openRegular(p string) (*os.File, fs.FileInfo, error) {
	info, err := os.Stat(p)
	if err != nil {
		return nil, nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, nil, invalid("path %q is no regular file", p)
	}
	f, err := os.OpenFile(p, os.O_RDONLY|atOnce, 0)
	if err != nil {
		return nil, nil, err
	}
	if info, err = f.Stat(); err == nil && !info.Mode().IsRegular() {
		err = invalid("path %q is no regular file", p)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// WriteFile serves a call. A link stays: what it points to is replaced.
func (s *Service) WriteFile(ctx context.Context, conn *wire.Conn, call *guestv1.WriteFile) error {
	if err := check(call.GetPath()); err != nil {
		return err
	}
	if call.GetParents() {
		if err := os.MkdirAll(path.Dir(call.GetPath()), 0o755); err != nil {
			return translate(err)
		}
	}
	p, err := resolve(call.GetPath())
	if err != nil {
		return translate(err)
	}
	there, err := os.Lstat(p)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		there = nil
	case err != nil:
		return translate(err)
	case !there.Mode().IsRegular():
		return invalid("path %q is no regular file", p)
	}
	f, err := os.CreateTemp(path.Dir(p), tempPattern)
	if err != nil {
		return translate(err)
	}
	// Once it has been moved into place this finds nothing.
	defer os.Remove(f.Name()) //nolint:errcheck // Nothing else could be done.
	n, err := s.receive(ctx, conn, f)
	if err == nil {
		err = dress(f, there, call.Mode)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return translate(err)
	}
	if err := os.Rename(f.Name(), p); err != nil {
		return translate(fmt.Errorf("replace file: %w", err))
	}
	return succeed(conn, transferred(1, n))
}

func transferred(files, bytes int64) *guestv1.Response {
	return &guestv1.Response{Result: &guestv1.Response_Transferred{Transferred: &guestv1.Transferred{
		Files: uint64(max(files, 0)), Bytes: uint64(max(bytes, 0)), //nolint:gosec // Not negative.
	}}}
}

// receive answers a WriteFile and takes what follows.
func (s *Service) receive(ctx context.Context, conn *wire.Conn, f *os.File) (int64, error) {
	defer conn.Bind(ctx)()
	if err := succeed(conn, &guestv1.Response{}); err != nil {
		return 0, err
	}
	buffer, free := s.buffer()
	defer free()
	return io.CopyBuffer(struct{ io.Writer }{f}, conn.Reader(), buffer)
}

// resolve follows a path that is a link, also to where there is nothing yet.
// What it returns has no link in it.
func resolve(p string) (string, error) {
	for range linkLayers {
		// The ".." of a folder behind a link is elsewhere than its name says.
		above, base := path.Split(p)
		above, err := filepath.EvalSymlinks(above)
		if err != nil {
			return "", err
		}
		found := path.Join(above, base)
		info, err := os.Lstat(found)
		if errors.Is(err, fs.ErrNotExist) {
			return found, nil
		}
		if err != nil {
			return "", err
		}
		if info.Mode().Type() != fs.ModeSymlink {
			return found, nil
		}
		if p, err = os.Readlink(found); err != nil {
			return "", err
		}
		if !path.IsAbs(p) {
			p = above + "/" + p
		}
	}
	return "", &fs.PathError{Op: "follow", Path: p, Err: syscall.ELOOP}
}

// dress gives a file its mode, and the owner of the one it replaces if that is
// allowed.
func dress(f *os.File, there fs.FileInfo, asked *uint32) error {
	mode := uint32(0o644)
	if there != nil {
		old := describe("", there)
		mode = old.GetMode()
		if err := f.Chown(int(old.GetUid()), int(old.GetGid())); err != nil {
			if !errors.Is(err, fs.ErrPermission) {
				return err
			}
			mode &= 0o777 // were meant for the other owner
		}
	}
	if asked != nil {
		mode = *asked
	}
	return f.Chmod(fileMode(mode))
}
