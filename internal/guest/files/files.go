// Package files is guestd's service of files: the calls of
// api/choiros/guest/v1/guest.proto about files, each of which says there what
// it does.
//
// It does what the user that guestd runs as may do, nothing more, and holds no
// more of a file in memory than one frame has. A path is absolute and clean;
// names that are not UTF-8 are shown with U+FFFD in place of what is not.
//
// Handlers send what succeeds; what fails they return, for guestd to send: an
// error of the system, wrapped, or a wire.FailureError.
package files

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path"
	"strings"
	"sync"
	"syscall"

	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/archive"
	"github.com/choiros/agent/internal/guest/wire"
)

// Service serves calls, any number at a time.
type Service struct {
	buffers sync.Pool // of *[wire.ChunkSize]byte
}

// New returns a Service, which holds nothing that must be closed.
func New() *Service {
	return &Service{buffers: sync.Pool{New: func() any { return new([wire.ChunkSize]byte) }}}
}

// buffer returns a buffer for a call, and what gives it back.
func (s *Service) buffer() ([]byte, func()) {
	b, ok := s.buffers.Get().(*[wire.ChunkSize]byte)
	if !ok {
		b = new([wire.ChunkSize]byte)
	}
	return b[:], func() { s.buffers.Put(b) }
}

// succeed answers a call, or says that its stream went well.
func succeed(conn *wire.Conn, response *guestv1.Response) error {
	response.Protocol = wire.Protocol
	return conn.Send(response)
}

func fail(code guestv1.Failure_Code, format string, args ...any) error {
	return &wire.FailureError{Failure: &guestv1.Failure{Code: code, Message: valid(fmt.Sprintf(format, args...))}}
}

func invalid(format string, args ...any) error {
	return fail(guestv1.Failure_CODE_INVALID, format, args...)
}

// valid makes a name fit for a message, whose strings are UTF-8.
func valid(name string) string { return strings.ToValidUTF8(name, "\uFFFD") }

// check refuses what is not an absolute and clean path.
func check(p string) error {
	switch {
	case !path.IsAbs(p):
		return invalid("path %q is not absolute", p)
	case path.Clean(p) != p:
		return invalid("path %q is not clean: %q is", p, path.Clean(p))
	case strings.ContainsRune(p, 0):
		return invalid("path %q has a zero byte", p)
	}
	return nil
}

// translate gives a code to errors that fs has no name for.
func translate(err error) error {
	if _, ok := errors.AsType[*wire.FailureError](err); ok || err == nil {
		return err
	}
	if errors.Is(err, archive.ErrRefused) || errors.Is(err, tar.ErrHeader) {
		return invalid("%v", err)
	}
	if errors.Is(err, archive.ErrLimit) {
		return fail(guestv1.Failure_CODE_EXHAUSTED, "%v", err)
	}
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok {
		return err
	}
	switch errno {
	case syscall.ENOTDIR, syscall.EISDIR, syscall.ELOOP, syscall.ENAMETOOLONG, syscall.EINVAL:
		return invalid("%v", err)
	case syscall.ENOTEMPTY, syscall.EBUSY, syscall.ETXTBSY:
		return fail(guestv1.Failure_CODE_STATE, "%v", err)
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EFBIG:
		return fail(guestv1.Failure_CODE_EXHAUSTED, "%v", err)
	case syscall.EROFS:
		return fail(guestv1.Failure_CODE_DENIED, "%v", err)
	}
	return err
}

// describe returns what a message says of a file.
func describe(name string, info fs.FileInfo) *guestv1.FileInfo {
	file := &guestv1.FileInfo{
		Name:       valid(name),
		SizeBytes:  uint64(max(info.Size(), 0)), //nolint:gosec // Not negative.
		Mode:       uint32(info.Mode().Perm()),
		ModifyTime: timestamppb.New(info.ModTime()),
	}
	switch info.Mode().Type() {
	case 0:
		file.Kind = guestv1.FileInfo_KIND_FILE
	case fs.ModeDir:
		file.Kind = guestv1.FileInfo_KIND_FOLDER
	case fs.ModeSymlink:
		file.Kind = guestv1.FileInfo_KIND_LINK
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		file.Mode = uint32(stat.Mode) & 0o7777 //nolint:unconvert,nolintlint // Its type differs by system.
		file.Uid, file.Gid = stat.Uid, stat.Gid
	}
	return file
}

// look describes the file at a path, itself.
func look(name, p string) (*guestv1.FileInfo, error) {
	info, err := os.Lstat(p)
	if err != nil {
		return nil, err
	}
	file := describe(name, info)
	if file.GetKind() == guestv1.FileInfo_KIND_LINK {
		target, err := os.Readlink(p)
		if err != nil {
			return nil, err
		}
		file.Target = valid(target)
	}
	return file, nil
}

// StatFile serves a call.
func (s *Service) StatFile(_ context.Context, conn *wire.Conn, call *guestv1.StatFile) error {
	if err := check(call.GetPath()); err != nil {
		return err
	}
	file, err := look(call.GetPath(), call.GetPath())
	if err != nil {
		return translate(err)
	}
	return succeed(conn, &guestv1.Response{Result: &guestv1.Response_File{File: file}})
}

// RemoveFile serves a call.
func (s *Service) RemoveFile(_ context.Context, conn *wire.Conn, call *guestv1.RemoveFile) error {
	p := call.GetPath()
	if err := check(p); err != nil {
		return err
	}
	if p == "/" {
		return invalid("path / is everything, and is not removed")
	}
	_, err := os.Lstat(p) // RemoveAll would not mind
	switch {
	case err != nil:
	case call.GetRecursive():
		err = os.RemoveAll(p)
	default:
		err = os.Remove(p)
	}
	if err != nil {
		return translate(err)
	}
	return succeed(conn, &guestv1.Response{})
}

// MakeFolder serves a call. Mode 0 is 0755.
func (s *Service) MakeFolder(_ context.Context, conn *wire.Conn, call *guestv1.MakeFolder) error {
	if err := check(call.GetPath()); err != nil {
		return err
	}
	if err := makeFolder(call.GetPath(), call.GetMode(), call.GetParents()); err != nil {
		return translate(err)
	}
	return succeed(conn, &guestv1.Response{})
}

func makeFolder(p string, mode uint32, parents bool) error {
	if info, err := os.Stat(p); err == nil {
		if info.IsDir() {
			return nil
		}
		return fmt.Errorf("%s is no folder: %w", p, fs.ErrExist)
	}
	if parents {
		if err := os.MkdirAll(path.Dir(p), 0o755); err != nil {
			return err
		}
	}
	if mode == 0 {
		mode = 0o755
	}
	if err := os.Mkdir(p, 0o700); err != nil {
		if info, statErr := os.Stat(p); statErr == nil && info.IsDir() {
			return nil // made by another meanwhile
		}
		return err
	}
	return os.Chmod(p, fileMode(mode)) // whatever the umask is
}

// fileMode returns permission bits with those of setuid, setgid and sticky.
func fileMode(bits uint32) fs.FileMode {
	mode := fs.FileMode(bits & 0o777)
	if bits&0o4000 != 0 {
		mode |= fs.ModeSetuid
	}
	if bits&0o2000 != 0 {
		mode |= fs.ModeSetgid
	}
	if bits&0o1000 != 0 {
		mode |= fs.ModeSticky
	}
	return mode
}

// signed returns a place in a file as the system counts it.
func signed(n uint64, what string) (int64, error) {
	if n > math.MaxInt64 {
		return 0, invalid("%s %d is beyond any file", what, n)
	}
	return int64(n), nil
}
