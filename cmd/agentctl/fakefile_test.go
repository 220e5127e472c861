package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/archive"
	"github.com/choiros/agent/internal/sandbox"
)

// inside returns where a path of a sandbox's is on this host.
func (f *fakeAgent) inside(name, path string) (string, error) {
	s, err := f.get(name)
	if err != nil {
		return "", err
	}
	if !filepath.IsAbs(path) {
		return "", fail(sandbox.Invalidf("path", "is not absolute"), name)
	}
	if err := os.MkdirAll(s.dir(), 0o755); err != nil {
		return "", err
	}
	return filepath.Join(s.dir(), filepath.Clean(path)), nil
}

// fileFail is an error of the file system's as the agent reports it.
func fileFail(err error, name, path string) error {
	sentinel := sandbox.ErrInvalid
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		sentinel = sandbox.ErrNotFound
	case errors.Is(err, fs.ErrPermission):
		sentinel = sandbox.ErrDenied
	}
	return fail(&sandbox.FieldError{Field: "path", Problem: fmt.Sprintf("%s: %s", path, unwrapAll(err)), Err: sentinel}, name)
}

func fileMessage(name string, info fs.FileInfo, path string) *agentv1.File {
	f := &agentv1.File{Name: name, Mode: uint32(info.Mode().Perm()), ModifyTime: timestamppb.New(info.ModTime())}
	stat := info.Sys().(*syscall.Stat_t)
	f.Uid, f.Gid = stat.Uid, stat.Gid
	switch {
	case info.Mode().IsRegular():
		f.Kind, f.SizeBytes = agentv1.FileKind_FILE_KIND_FILE, uint64(info.Size())
	case info.IsDir():
		f.Kind = agentv1.FileKind_FILE_KIND_FOLDER
	case info.Mode()&fs.ModeSymlink != 0:
		f.Kind = agentv1.FileKind_FILE_KIND_LINK
		f.Target, _ = os.Readlink(path)
	}
	return f
}

func (f *fakeAgent) StatFile(_ context.Context, req *agentv1.StatFileRequest) (*agentv1.StatFileResponse, error) {
	path, err := f.inside(req.GetName(), req.GetPath())
	if err != nil {
		return nil, err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return nil, fileFail(err, req.GetName(), req.GetPath())
	}
	return &agentv1.StatFileResponse{File: fileMessage(req.GetPath(), info, path)}, nil
}

func (f *fakeAgent) ListFiles(_ context.Context, req *agentv1.ListFilesRequest) (*agentv1.ListFilesResponse, error) {
	path, err := f.inside(req.GetName(), req.GetPath())
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, fileFail(err, req.GetName(), req.GetPath())
	}
	answer := &agentv1.ListFilesResponse{}
	for _, entry := range entries {
		if entry.Name() <= req.GetPageToken() {
			continue
		}
		if len(answer.Files) == 2 { // small pages, so that tests turn them
			answer.NextPageToken = answer.Files[1].GetName()
			break
		}
		info, err := entry.Info()
		if err != nil {
			return nil, err
		}
		answer.Files = append(answer.Files, fileMessage(entry.Name(), info, filepath.Join(path, entry.Name())))
	}
	return answer, nil
}

func (f *fakeAgent) ReadFile(req *agentv1.ReadFileRequest, stream grpc.ServerStreamingServer[agentv1.ReadFileResponse]) error {
	path, err := f.inside(req.GetName(), req.GetPath())
	if err != nil {
		return err
	}
	file, err := os.Open(path)
	if err != nil {
		return fileFail(err, req.GetName(), req.GetPath())
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if err := stream.Send(&agentv1.ReadFileResponse{File: fileMessage(req.GetPath(), info, path)}); err != nil {
		return err
	}
	length := int64(req.GetLength())
	if length == 0 {
		length = info.Size()
	}
	_, err = io.Copy(writerFunc(func(p []byte) error { return stream.Send(&agentv1.ReadFileResponse{Data: p}) }),
		io.NewSectionReader(file, int64(req.GetOffset()), length))
	return err
}

type writerFunc func([]byte) error

func (w writerFunc) Write(p []byte) (int, error) { return len(p), w(p) }

// readerFunc reads the pieces that next returns.
type readerFunc struct {
	next func() ([]byte, error)
	rest []byte
}

func (r *readerFunc) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		data, err := r.next()
		if err != nil {
			return 0, err
		}
		r.rest = data
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (f *fakeAgent) WriteFile(stream grpc.ClientStreamingServer[agentv1.WriteFileRequest, agentv1.WriteFileResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	header := first.GetHeader()
	path, err := f.inside(header.GetName(), header.GetPath())
	if err != nil {
		return err
	}
	if header.GetParents() {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
	}
	part, err := os.Create(path + ".part")
	if err != nil {
		return fileFail(err, header.GetName(), header.GetPath())
	}
	n, err := io.Copy(part, &readerFunc{next: func() ([]byte, error) {
		req, err := stream.Recv()
		return req.GetData(), err
	}})
	mode := fs.FileMode(0o644)
	if header.Mode != nil {
		mode = fs.FileMode(header.GetMode())
	}
	if err := errors.Join(err, part.Chmod(mode), part.Close()); err != nil {
		return errors.Join(err, os.Remove(path+".part"))
	}
	if err := os.Rename(path+".part", path); err != nil {
		return err
	}
	return stream.SendAndClose(&agentv1.WriteFileResponse{SizeBytes: uint64(n)})
}

func (f *fakeAgent) RemoveFile(_ context.Context, req *agentv1.RemoveFileRequest) (*agentv1.RemoveFileResponse, error) {
	path, err := f.inside(req.GetName(), req.GetPath())
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(path); err != nil || !req.GetRecursive() {
		return &agentv1.RemoveFileResponse{}, fileFail(errors.Join(err, os.Remove(path)), req.GetName(), req.GetPath())
	}
	return &agentv1.RemoveFileResponse{}, os.RemoveAll(path)
}

func (f *fakeAgent) MakeFolder(_ context.Context, req *agentv1.MakeFolderRequest) (*agentv1.MakeFolderResponse, error) {
	path, err := f.inside(req.GetName(), req.GetPath())
	if err != nil {
		return nil, err
	}
	mode, mkdir := fs.FileMode(0o755), os.Mkdir
	if req.GetMode() != 0 {
		mode = fs.FileMode(req.GetMode())
	}
	if req.GetParents() {
		mkdir = os.MkdirAll
	}
	if err := mkdir(path, mode); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fileFail(err, req.GetName(), req.GetPath())
	}
	return &agentv1.MakeFolderResponse{}, os.Chmod(path, mode)
}

func (f *fakeAgent) DownloadArchive(req *agentv1.DownloadArchiveRequest, stream grpc.ServerStreamingServer[agentv1.DownloadArchiveResponse]) error {
	path, err := f.inside(req.GetName(), req.GetPath())
	if err != nil {
		return err
	}
	lookAt := os.Lstat
	if req.GetFollow() {
		lookAt = os.Stat
	}
	info, err := lookAt(path)
	if err != nil {
		return fileFail(err, req.GetName(), req.GetPath())
	}
	if err := stream.Send(&agentv1.DownloadArchiveResponse{File: fileMessage(req.GetPath(), info, path)}); err != nil {
		return err
	}
	send := writerFunc(func(p []byte) error { return stream.Send(&agentv1.DownloadArchiveResponse{Data: p}) })
	f.mu.Lock()
	hostile := f.archive
	f.mu.Unlock()
	if hostile != nil {
		_, err := send.Write(hostile)
		return err
	}
	return archive.Pack(stream.Context(), send, path, filepath.Base(req.GetPath()), archive.PackOptions{Follow: req.GetFollow()})
}

// hostileArchive tries to leave the folder that it is unpacked in.
func hostileArchive() []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: "data/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "data/good", Typeflag: tar.TypeReg, Mode: 0o644},
		{Name: "data/out", Typeflag: tar.TypeSymlink, Linkname: "../.."},
		{Name: "data/../../escaped", Typeflag: tar.TypeReg, Mode: 0o644},
	} {
		_ = w.WriteHeader(h)
	}
	_ = w.Close()
	return b.Bytes()
}

func (f *fakeAgent) UploadArchive(stream grpc.ClientStreamingServer[agentv1.UploadArchiveRequest, agentv1.UploadArchiveResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	header := first.GetHeader()
	path, err := f.inside(header.GetName(), header.GetPath())
	if err != nil {
		return err
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return fileFail(err, header.GetName(), header.GetPath())
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return fileFail(err, header.GetName(), header.GetPath())
	}
	defer root.Close()
	sum, err := archive.Unpack(stream.Context(), &readerFunc{next: func() ([]byte, error) {
		req, err := stream.Recv()
		return req.GetData(), err
	}}, root, archive.UnpackOptions{Rename: header.GetRename(), AnyLinks: true})
	if err != nil {
		return fail(fmt.Errorf("unpack: %w: %w", sandbox.ErrCorrupt, err), header.GetName())
	}
	return stream.SendAndClose(&agentv1.UploadArchiveResponse{Files: uint64(sum.Files), SizeBytes: uint64(sum.Bytes)})
}

// WatchFiles compares listings, every now and then.
func (f *fakeAgent) WatchFiles(req *agentv1.WatchFilesRequest, stream grpc.ServerStreamingServer[agentv1.WatchFilesResponse]) error {
	path, err := f.inside(req.GetName(), req.GetPath())
	if err != nil {
		return err
	}
	if _, err := os.Stat(path); err != nil {
		return fileFail(err, req.GetName(), req.GetPath())
	}
	listing := func() map[string]time.Time {
		found := map[string]time.Time{}
		_ = filepath.WalkDir(path, func(p string, entry fs.DirEntry, err error) error {
			if rel := strings.TrimPrefix(p, path+"/"); err == nil && rel != p && (req.GetRecursive() || !strings.Contains(rel, "/")) {
				if info, err := entry.Info(); err == nil {
					found[filepath.Join(req.GetPath(), rel)] = info.ModTime()
				}
			}
			return nil
		})
		return found
	}
	before := listing()
	if err := stream.Send(&agentv1.WatchFilesResponse{}); err != nil {
		return err
	}
	for {
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-time.After(10 * time.Millisecond):
		}
		after, step := listing(), &agentv1.WatchFilesResponse{}
		for name, at := range after {
			if old, ok := before[name]; !ok {
				step.Changes = append(step.Changes, &agentv1.FileChange{Path: name, Kind: agentv1.FileChange_KIND_CREATED})
			} else if !old.Equal(at) {
				step.Changes = append(step.Changes, &agentv1.FileChange{Path: name, Kind: agentv1.FileChange_KIND_CHANGED})
			}
		}
		for name := range before {
			if _, ok := after[name]; !ok {
				step.Changes = append(step.Changes, &agentv1.FileChange{Path: name, Kind: agentv1.FileChange_KIND_REMOVED})
			}
		}
		if before = after; len(step.Changes) > 0 {
			if err := stream.Send(step); err != nil {
				return err
			}
		}
	}
}
