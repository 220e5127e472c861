package server_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

func TestFilesOverTheAPI(t *testing.T) {
	t.Parallel()
	conn := insider(t, nil)
	client := agentv1.NewFileServiceClient(conn)
	dir := t.TempDir()
	ctx := t.Context()
	path := filepath.Join(dir, "sub", "file")
	content := bytes.Repeat([]byte("0123456789"), 50_000)
	write, err := client.WriteFile(ctx)
	if err != nil {
		t.Fatal(err)
	}
	mode := uint32(0o640)
	_ = write.Send(&agentv1.WriteFileRequest{Message: &agentv1.WriteFileRequest_Header{
		Header: &agentv1.WriteFileHeader{Name: "web", Path: path, Mode: &mode, Parents: true},
	}})
	for chunk := range slices.Chunk(content, 100_000) {
		_ = write.Send(&agentv1.WriteFileRequest{Message: &agentv1.WriteFileRequest_Data{Data: chunk}})
	}
	if done, err := write.CloseAndRecv(); err != nil || done.GetSizeBytes() != uint64(len(content)) {
		t.Fatalf("%v, %v", done, err)
	}
	stat, err := client.StatFile(ctx, &agentv1.StatFileRequest{Name: "web", Path: path})
	if err != nil || stat.GetFile().GetSizeBytes() != uint64(len(content)) || stat.GetFile().GetMode() != mode || stat.GetFile().GetKind() != agentv1.FileKind_FILE_KIND_FILE {
		t.Errorf("%v, %v", stat, err)
	}
	read, err := client.ReadFile(ctx, &agentv1.ReadFileRequest{Name: "web", Path: path, Offset: 10, Length: 20})
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	for {
		part, err := read.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, part.GetData()...)
	}
	if !bytes.Equal(got, content[10:30]) {
		t.Errorf("read %q", got)
	}
	if _, err := client.MakeFolder(ctx, &agentv1.MakeFolderRequest{Name: "web", Path: filepath.Join(dir, "a", "b"), Parents: true}); err != nil {
		t.Error(err)
	}
	var names []string
	for token := ""; ; {
		page, err := client.ListFiles(ctx, &agentv1.ListFilesRequest{Name: "web", Path: dir, PageSize: 1, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range page.GetFiles() {
			names = append(names, f.GetName())
		}
		if token = page.GetNextPageToken(); token == "" {
			break
		}
	}
	if !slices.Equal(names, []string{"a", "sub"}) {
		t.Errorf("listed %q", names)
	}
	archiveRoundTrip(t, client, filepath.Join(dir, "sub"), filepath.Join(dir, "copy"), content)
	if _, err := client.RemoveFile(ctx, &agentv1.RemoveFileRequest{Name: "web", Path: filepath.Join(dir, "sub"), Recursive: true}); err != nil {
		t.Error(err)
	}
	if _, err := client.StatFile(ctx, &agentv1.StatFileRequest{Name: "web", Path: path}); status.Code(err) != codes.NotFound {
		t.Errorf("removed: %v", err)
	}
	for _, bad := range []string{"", "relative", "/a/../b"} {
		if _, err := client.StatFile(ctx, &agentv1.StatFileRequest{Name: "web", Path: bad}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("path %q: %v", bad, err)
		}
	}
}

func archiveRoundTrip(t *testing.T, client agentv1.FileServiceClient, from, to string, content []byte) {
	t.Helper()
	down, err := client.DownloadArchive(t.Context(), &agentv1.DownloadArchiveRequest{Name: "web", Path: from})
	if err != nil {
		t.Fatal(err)
	}
	up, err := client.UploadArchive(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = up.Send(&agentv1.UploadArchiveRequest{Message: &agentv1.UploadArchiveRequest_Header{
		Header: &agentv1.UploadArchiveHeader{Name: "web", Path: filepath.Dir(to), Rename: filepath.Base(to)},
	}})
	for {
		part, err := down.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(part.GetData()) > 0 {
			_ = up.Send(&agentv1.UploadArchiveRequest{Message: &agentv1.UploadArchiveRequest_Data{Data: part.GetData()}})
		}
	}
	if _, err := up.CloseAndRecv(); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(to, "file")); err != nil || !bytes.Equal(got, content) {
		t.Errorf("copied %d bytes, %v", len(got), err)
	}
}

func TestWatchFilesOverTheAPI(t *testing.T) {
	t.Parallel()
	conn := insider(t, nil)
	dir := t.TempDir()
	watch, err := agentv1.NewFileServiceClient(conn).WatchFiles(t.Context(), &agentv1.WatchFilesRequest{Name: "web", Path: dir, Recursive: true})
	if err != nil {
		t.Fatal(err)
	}
	if first, err := watch.Recv(); err != nil || len(first.GetChanges()) > 0 {
		t.Fatalf("%v, %v", first, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "new"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	change, err := watch.Recv()
	if err != nil || change.GetChanges()[0].GetPath() != filepath.Join(dir, "new") || change.GetChanges()[0].GetKind() != agentv1.FileChange_KIND_CREATED {
		t.Errorf("%v, %v", change, err)
	}
}
