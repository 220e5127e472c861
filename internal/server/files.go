package server

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"strings"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

const (
	maxListing = 1000
	// fileChunk is how much of a file goes into one response.
	fileChunk = 64 << 10
	maxMode   = 0o7777
)

type fileService struct {
	agentv1.UnimplementedFileServiceServer
	manager *manager.Manager
}

// visitFile is visit for calls about a path.
func (s *fileService) visitFile(ctx context.Context, name, path string) (*manager.Visit, error) {
	if err := sandbox.ValidateName("name", name); err != nil {
		return nil, err
	}
	if err := sandbox.ValidatePath("path", path); err != nil {
		return nil, err
	}
	return s.manager.Visit(ctx, name)
}

func (s *fileService) StatFile(ctx context.Context, req *agentv1.StatFileRequest) (*agentv1.StatFileResponse, error) {
	there, err := s.visitFile(ctx, req.GetName(), req.GetPath())
	if err != nil {
		return nil, err
	}
	defer there.Leave()
	file, err := there.Guest.Stat(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	return &agentv1.StatFileResponse{File: fileToWire(file)}, nil
}

func fileToWire(f guest.File) *agentv1.File {
	kinds := map[guestv1.FileInfo_Kind]agentv1.FileKind{
		guestv1.FileInfo_KIND_FILE:   agentv1.FileKind_FILE_KIND_FILE,
		guestv1.FileInfo_KIND_FOLDER: agentv1.FileKind_FILE_KIND_FOLDER,
		guestv1.FileInfo_KIND_LINK:   agentv1.FileKind_FILE_KIND_LINK,
	}
	return &agentv1.File{
		Name: f.Name, Kind: kinds[f.Kind], SizeBytes: f.Size, Mode: f.Mode, Uid: f.UID, Gid: f.GID,
		ModifyTime: timeToWire(f.Modified), Target: f.Target,
	}
}

func (s *fileService) ListFiles(ctx context.Context, req *agentv1.ListFilesRequest) (*agentv1.ListFilesResponse, error) {
	limit := int(req.GetPageSize())
	if limit < 0 {
		return nil, sandbox.Invalidf("page_size", "%d is negative", limit)
	}
	if limit == 0 || limit > maxListing {
		limit = maxListing
	}
	after, err := parseFileToken(req.GetPageToken(), req.GetPath())
	if err != nil {
		return nil, err
	}
	there, err := s.visitFile(ctx, req.GetName(), req.GetPath())
	if err != nil {
		return nil, err
	}
	defer there.Leave()
	files, more, err := there.Guest.List(ctx, req.GetPath(), after, limit)
	if err != nil {
		return nil, err
	}
	var answer agentv1.ListFilesResponse
	for _, f := range files {
		answer.Files = append(answer.Files, fileToWire(f))
	}
	if more && len(files) > 0 {
		mark := selectorMark(req.GetPath())
		answer.NextPageToken = base64.RawURLEncoding.EncodeToString([]byte(mark + files[len(files)-1].Name))
	}
	return &answer, nil
}

// parseFileToken tells after which file of a folder to go on.
func parseFileToken(token, path string) (after string, err error) {
	if token == "" {
		return "", nil
	}
	data, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		return "", sandbox.Invalidf("page_token", "was not handed out by this agent")
	}
	after, found := strings.CutPrefix(string(data), selectorMark(path))
	if !found {
		return "", sandbox.Invalidf("page_token", "is not of a list of this path")
	}
	return after, nil
}

func (s *fileService) ReadFile(req *agentv1.ReadFileRequest, stream agentv1.FileService_ReadFileServer) error {
	ctx := stream.Context()
	there, err := s.visitFile(ctx, req.GetName(), req.GetPath())
	if err != nil {
		return err
	}
	defer there.Leave()
	download, err := there.Guest.Read(ctx, req.GetPath(), req.GetOffset(), req.GetLength())
	if err != nil {
		return err
	}
	defer download.Close()
	if err := stream.Send(&agentv1.ReadFileResponse{File: fileToWire(download.File)}); err != nil {
		return err
	}
	return chunks(download, func(data []byte) error { return stream.Send(&agentv1.ReadFileResponse{Data: data}) })
}

// chunks sends all that a reader has. send keeps nothing of what it is given.
func chunks(r io.Reader, send func([]byte) error) error {
	buf := make([]byte, fileChunk)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if err := send(buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (s *fileService) DownloadArchive(req *agentv1.DownloadArchiveRequest, stream agentv1.FileService_DownloadArchiveServer) error {
	ctx := stream.Context()
	there, err := s.visitFile(ctx, req.GetName(), req.GetPath())
	if err != nil {
		return err
	}
	defer there.Leave()
	download, err := there.Guest.Pack(ctx, req.GetPath(), req.GetFollow())
	if err != nil {
		return err
	}
	defer download.Close()
	if err := stream.Send(&agentv1.DownloadArchiveResponse{File: fileToWire(download.File)}); err != nil {
		return err
	}
	return chunks(download, func(data []byte) error { return stream.Send(&agentv1.DownloadArchiveResponse{Data: data}) })
}

func (s *fileService) WriteFile(stream agentv1.FileService_WriteFileServer) error {
	first, err := stream.Recv()
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	header := first.GetHeader()
	if header == nil {
		return sandbox.Invalidf("header", "is missing: the first request has it")
	}
	if header.GetMode() > maxMode {
		return sandbox.Invalidf("header.mode", "%#o has bits beyond %#o", header.GetMode(), maxMode)
	}
	ctx := stream.Context()
	there, err := s.visitFile(ctx, header.GetName(), header.GetPath())
	if err != nil {
		return err
	}
	defer there.Leave()
	upload, err := there.Guest.Write(ctx, header.GetPath(), header.Mode, header.GetParents())
	if err != nil {
		return err
	}
	defer upload.Close()
	_, size, err := uploaded(upload, func() ([]byte, bool, error) {
		req, err := stream.Recv()
		return req.GetData(), req.GetHeader() != nil, err
	})
	if err != nil {
		return err
	}
	return stream.SendAndClose(&agentv1.WriteFileResponse{SizeBytes: size})
}

// uploaded passes on what comes up to the end of a stream. receive returns the
// next request's data, and whether it has a header, as only the first may.
func uploaded(to *guest.Upload, receive func() (data []byte, header bool, err error)) (files, size uint64, err error) {
	for {
		data, header, err := receive()
		if errors.Is(err, io.EOF) {
			return to.Finish()
		}
		if err == nil && header {
			err = sandbox.Invalidf("header", "came twice")
		}
		if err == nil {
			_, err = to.Write(data)
		}
		if err != nil {
			return 0, 0, err
		}
	}
}

func (s *fileService) UploadArchive(stream agentv1.FileService_UploadArchiveServer) error {
	first, err := stream.Recv()
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	header := first.GetHeader()
	if header == nil {
		return sandbox.Invalidf("header", "is missing: the first request has it")
	}
	if rename := header.GetRename(); strings.Contains(rename, "/") || rename == "." || rename == ".." {
		return sandbox.Invalidf("header.rename", "is not the name of a file")
	}
	ctx := stream.Context()
	there, err := s.visitFile(ctx, header.GetName(), header.GetPath())
	if err != nil {
		return err
	}
	defer there.Leave()
	upload, err := there.Guest.Unpack(ctx, header.GetPath(), header.GetRename(), header.GetOwners())
	if err != nil {
		return err
	}
	defer upload.Close()
	files, size, err := uploaded(upload, func() ([]byte, bool, error) {
		req, err := stream.Recv()
		return req.GetData(), req.GetHeader() != nil, err
	})
	if err != nil {
		return err
	}
	return stream.SendAndClose(&agentv1.UploadArchiveResponse{Files: files, SizeBytes: size})
}

func (s *fileService) RemoveFile(ctx context.Context, req *agentv1.RemoveFileRequest) (*agentv1.RemoveFileResponse, error) {
	there, err := s.visitFile(ctx, req.GetName(), req.GetPath())
	if err != nil {
		return nil, err
	}
	defer there.Leave()
	if err := there.Guest.Remove(ctx, req.GetPath(), req.GetRecursive()); err != nil {
		return nil, err
	}
	return &agentv1.RemoveFileResponse{}, nil
}

func (s *fileService) MakeFolder(ctx context.Context, req *agentv1.MakeFolderRequest) (*agentv1.MakeFolderResponse, error) {
	mode := req.GetMode()
	if mode > maxMode {
		return nil, sandbox.Invalidf("mode", "%#o has bits beyond %#o", mode, maxMode)
	}
	if mode == 0 {
		mode = 0o755
	}
	there, err := s.visitFile(ctx, req.GetName(), req.GetPath())
	if err != nil {
		return nil, err
	}
	defer there.Leave()
	if err := there.Guest.MakeFolder(ctx, req.GetPath(), mode, req.GetParents()); err != nil {
		return nil, err
	}
	return &agentv1.MakeFolderResponse{}, nil
}

func (s *fileService) WatchFiles(req *agentv1.WatchFilesRequest, stream agentv1.FileService_WatchFilesServer) error {
	there, err := s.visitFile(stream.Context(), req.GetName(), req.GetPath())
	if err != nil {
		return err
	}
	defer there.Leave()
	kinds := map[guestv1.FileChange_Kind]agentv1.FileChange_Kind{
		guestv1.FileChange_KIND_CREATED: agentv1.FileChange_KIND_CREATED,
		guestv1.FileChange_KIND_CHANGED: agentv1.FileChange_KIND_CHANGED,
		guestv1.FileChange_KIND_REMOVED: agentv1.FileChange_KIND_REMOVED,
	}
	return there.Guest.WatchFiles(stream.Context(), req.GetPath(), req.GetRecursive(), func(changes []*guestv1.FileChange, lost bool) error {
		w := &agentv1.WatchFilesResponse{Lost: lost}
		for _, change := range changes {
			w.Changes = append(w.Changes, &agentv1.FileChange{Path: change.GetPath(), Kind: kinds[change.GetKind()]})
		}
		return stream.Send(w)
	})
}
