package server_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
	"github.com/choiros/agent/internal/server"
)

// shelf is an image store in memory behind a driver of processes. An archive
// is a tar, each file of it an image by its name.
type shelf struct {
	*process.Driver
	// proceed, if set, is received from in the middle of a pull.
	proceed chan struct{}

	mu     sync.Mutex
	images []sandbox.Image
	loads  int // that were begun
	ended  int // of those
	pulled int
}

func (s *shelf) LoadImage(ctx context.Context, archive io.Reader) (_ []sandbox.Image, err error) {
	s.mu.Lock()
	s.loads++
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.ended++
		s.mu.Unlock()
	}()
	var found []sandbox.Image
	for files := tar.NewReader(archive); ; {
		file, err := files.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("load: %w: %w", sandbox.ErrCorrupt, err)
		}
		if _, err := io.Copy(io.Discard, files); err != nil {
			return nil, fmt.Errorf("load: %w: %w", sandbox.ErrCorrupt, err)
		}
		found = append(found, sandbox.Image{ID: "sha256:" + file.Name, Names: []string{file.Name}, SizeBytes: uint64(file.Size)})
	}
	// A store reads to the end before it adds anything.
	if _, err := io.Copy(io.Discard, archive); err != nil {
		return nil, fmt.Errorf("load: %w: %w", sandbox.ErrCorrupt, err)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.images = append(s.images, found...)
	return found, nil
}

func (s *shelf) PullImage(ctx context.Context, reference string, progress func(string)) (sandbox.Image, error) {
	progress("resolving " + reference)
	if s.proceed != nil {
		select {
		case <-s.proceed:
		case <-ctx.Done():
			return sandbox.Image{}, ctx.Err()
		}
	}
	progress("done \xff")
	image := sandbox.Image{ID: "sha256:1", Digest: "sha256:2", Names: []string{reference}, CreatedAt: time.Unix(5, 0)}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pulled++
	s.images = append(s.images, image)
	return image, nil
}

func (s *shelf) Images(context.Context) ([]sandbox.Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.ContainsFunc(s.images, func(i sandbox.Image) bool { return i.ID == "sha256:panic" }) {
		panic("the shelf broke")
	}
	return slices.Clone(s.images), nil
}

func (s *shelf) RemoveImage(_ context.Context, reference string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if reference == "used" {
		return fmt.Errorf("remove %s: a sandbox uses it: %w", reference, sandbox.ErrState)
	}
	i := slices.IndexFunc(s.images, func(i sandbox.Image) bool { return slices.Contains(i.Names, reference) })
	if i < 0 {
		return fmt.Errorf("remove %s: %w", reference, sandbox.ErrNotFound)
	}
	s.images = slices.Delete(s.images, i, i+1)
	return nil
}

// quiet waits until no load is under way, and says how many images there are.
func (s *shelf) quiet(t *testing.T) int {
	t.Helper()
	for {
		s.mu.Lock()
		begun, ended, images := s.loads, s.ended, len(s.images)
		s.mu.Unlock()
		if begun == ended {
			return images
		}
		select {
		case <-time.After(time.Millisecond):
		case <-t.Context().Done():
			t.Fatal("a load goes on for ever")
		}
	}
}

// newShelf starts an agent with an image store.
func newShelf(t *testing.T, opts agentOptions) (*shelf, *testAgent) {
	t.Helper()
	s := &shelf{}
	inner := processes(t)
	opts.Drivers = func(owner string) map[string]sandbox.Driver {
		drivers := inner(owner)
		s.Driver = drivers[process.Name].(*process.Driver)
		return map[string]sandbox.Driver{process.Name: s}
	}
	return s, startAgent(t, opts)
}

// tarball is an archive of one image of that many bytes.
func tarball(t *testing.T, name string, size int) []byte {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(size)})
	if err == nil {
		_, err = w.Write(bytes.Repeat([]byte{'x'}, size))
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return archive.Bytes()
}

func header(size int, id string) *agentv1.LoadImageRequest {
	return &agentv1.LoadImageRequest{Part: &agentv1.LoadImageRequest_Header_{
		Header: &agentv1.LoadImageRequest_Header{SizeBytes: uint64(size), RequestId: id},
	}}
}

func chunk(data []byte) *agentv1.LoadImageRequest {
	return &agentv1.LoadImageRequest{Part: &agentv1.LoadImageRequest_Data{Data: data}}
}

// load sends the messages, and the end unless it is cut off by the server.
func load(t *testing.T, c clients, messages ...*agentv1.LoadImageRequest) (*agentv1.LoadImageResponse, error) {
	t.Helper()
	stream, err := c.images.LoadImage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, message := range messages {
		if err := stream.Send(message); errors.Is(err, io.EOF) {
			break // CloseAndRecv tells why
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return stream.CloseAndRecv()
}

func TestLoadImage(t *testing.T) {
	t.Parallel()
	shelf, agent := newShelf(t, agentOptions{Server: server.Config{MaxArchiveBytes: 4 << 20}})
	c := dial(t, agent)
	archive := tarball(t, "web", 3<<20)
	parts := func(first *agentv1.LoadImageRequest, data []byte) []*agentv1.LoadImageRequest {
		messages := []*agentv1.LoadImageRequest{first}
		for part := range slices.Chunk(data, 1<<20) {
			messages = append(messages, chunk(part))
		}
		return messages
	}
	for _, test := range []struct {
		name     string
		messages []*agentv1.LoadImageRequest
		reason   string
		field    string
		says     string
	}{
		{"nothing", nil, "INVALID", "header", "first message"},
		{"no header", parts(nil, archive)[1:], "INVALID", "header", "first message"},
		{"empty archive", parts(header(0, ""), nil), "", "", ""},
		{"truncated", parts(header(len(archive), ""), archive[:len(archive)-4096]), "CORRUPT", "data", "truncated"},
		{"one byte short", parts(header(len(archive), ""), archive[:len(archive)-1]), "CORRUPT", "data", "truncated"},
		{"nothing of it", parts(header(len(archive), ""), nil), "CORRUPT", "data", "truncated"},
		{"too long", parts(header(len(archive)-1, ""), archive), "CORRUPT", "data", "longer"},
		{"truncated, undeclared", parts(header(0, ""), archive[:1<<20]), "CORRUPT", "", ""},
		{"not an archive", parts(header(0, ""), bytes.Repeat([]byte("junk"), 4096)), "CORRUPT", "", ""},
		{"declared too big", parts(header(4<<20+1, ""), nil), "INVALID", "header.size_bytes", "more than"},
		{"too big", parts(header(0, ""), make([]byte, 5<<20)), "INVALID", "data", "longer than"},
		{"chunk too big", []*agentv1.LoadImageRequest{header(0, ""), chunk(make([]byte, 1<<20+1))}, "INVALID", "data", "at most"},
		{"second header", []*agentv1.LoadImageRequest{header(0, ""), header(0, "")}, "INVALID", "data", "missing"},
		{"empty message", []*agentv1.LoadImageRequest{header(0, ""), {}}, "INVALID", "data", "missing"},
		{"bad request id", parts(header(0, "a\nb"), archive), "INVALID", "request_id", ""},
		{"whole", parts(header(len(archive), ""), archive), "", "", ""},
		{"whole, undeclared", parts(header(0, ""), archive), "", "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := shelf.quiet(t)
			answer, err := load(t, c, test.messages...)
			added := shelf.quiet(t) - before
			if test.reason == "" {
				if err != nil || added != len(answer.GetImages()) {
					t.Errorf("%v, %v; added %d", answer, err, added)
				}
				return
			}
			wantError(t, err, codes.InvalidArgument, test.reason, test.field)
			if err != nil && !strings.Contains(err.Error(), test.says) {
				t.Errorf("error %v does not say %q", err, test.says)
			}
			if added != 0 {
				t.Errorf("added %d images", added)
			}
		})
	}
}

func TestLoadImageIsAbortedByTheClientsLeaving(t *testing.T) {
	t.Parallel()
	shelf, agent := newShelf(t, agentOptions{})
	c := dial(t, agent)
	for _, id := range []string{"", "with-id"} {
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := c.images.LoadImage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		archive := tarball(t, "web", 1<<20)
		if err := errors.Join(stream.Send(header(len(archive), id)), stream.Send(chunk(archive[:1<<19]))); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the load begins", func() bool {
			shelf.mu.Lock()
			defer shelf.mu.Unlock()
			return shelf.loads > shelf.ended
		})
		cancel()
		if n := shelf.quiet(t); n != 0 {
			t.Errorf("%d images were added", n)
		}
		// The same id is free again: errors are not kept.
		answer, err := load(t, c, header(len(archive), id), chunk(archive[:1<<20]), chunk(archive[1<<20:]))
		if err != nil || len(answer.GetImages()) != 1 {
			t.Errorf("again: %v, %v", answer, err)
		}
		shelf.mu.Lock()
		shelf.images = nil
		shelf.mu.Unlock()
	}
}

func TestLoadImageIsRepeatedOnce(t *testing.T) {
	t.Parallel()
	shelf, agent := newShelf(t, agentOptions{})
	c := dial(t, agent)
	archive := tarball(t, "web", 1000)
	first, err := load(t, c, header(len(archive), "id"), chunk(archive))
	if err != nil {
		t.Fatal(err)
	}
	for _, messages := range [][]*agentv1.LoadImageRequest{
		{header(len(archive), "id"), chunk(archive)},
		{header(len(archive), "id")}, // answered before the rest arrives
	} {
		again, err := load(t, c, messages...)
		if err != nil || again.GetImages()[0].GetId() != first.GetImages()[0].GetId() {
			t.Errorf("retry: %v, %v", again, err)
		}
	}
	_, err = load(t, c, header(0, "id"), chunk(archive))
	wantError(t, err, codes.InvalidArgument, "REQUEST_ID_REUSED", "request_id")
	if n := shelf.quiet(t); n != 1 {
		t.Errorf("%d images, want 1", n)
	}
}

func TestPullTellsProgressAndGoesOnWithoutItsCaller(t *testing.T) {
	t.Parallel()
	shelf, agent := newShelf(t, agentOptions{})
	shelf.proceed = make(chan struct{})
	c := dial(t, agent)
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := c.images.PullImage(ctx, &agentv1.PullImageRequest{Reference: "example.org/web:1", RequestId: "id"})
	if err != nil {
		t.Fatal(err)
	}
	if line, err := stream.Recv(); err != nil || line.GetProgress() != "resolving example.org/web:1" {
		t.Fatalf("first line = %v, %v", line, err)
	}
	cancel()
	if _, err := stream.Recv(); err == nil {
		t.Fatal("the stream goes on")
	}
	// The retry joins what goes on.
	stream, err = c.images.PullImage(t.Context(), &agentv1.PullImageRequest{Reference: "example.org/web:1", RequestId: "id"})
	if err != nil {
		t.Fatal(err)
	}
	close(shelf.proceed)
	last, err := stream.Recv()
	if err != nil || last.GetImage().GetDigest() != "sha256:2" || last.GetImage().GetCreateTime().AsTime().Unix() != 5 {
		t.Errorf("answer of the retry = %v, %v", last, err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after the image: %v", err)
	}
	if shelf.pulled != 1 {
		t.Errorf("pulled %d times", shelf.pulled)
	}
	var lines []string
	stream, err = c.images.PullImage(t.Context(), &agentv1.PullImageRequest{Reference: "x"})
	for err == nil {
		var m *agentv1.PullImageResponse
		if m, err = stream.Recv(); m.GetProgress() != "" {
			lines = append(lines, m.GetProgress())
		}
	}
	if !errors.Is(err, io.EOF) || !slices.Equal(lines, []string{"resolving x", "done \uFFFD"}) {
		t.Errorf("lines %q, %v", lines, err)
	}
}

func TestImagesAreListedAndRemoved(t *testing.T) {
	t.Parallel()
	shelf, agent := newShelf(t, agentOptions{})
	c := dial(t, agent)
	shelf.images = []sandbox.Image{{ID: "sha256:1", Names: []string{"web"}}}
	list, err := c.images.ListImages(t.Context(), &agentv1.ListImagesRequest{Driver: process.Name})
	if err != nil || len(list.GetImages()) != 1 || list.GetImages()[0].GetNames()[0] != "web" {
		t.Errorf("list = %v, %v", list, err)
	}
	_, err = c.images.ListImages(t.Context(), &agentv1.ListImagesRequest{Driver: "other"})
	wantCode(t, err, codes.InvalidArgument)
	_, err = c.images.RemoveImage(t.Context(), &agentv1.RemoveImageRequest{})
	wantError(t, err, codes.InvalidArgument, "INVALID", "reference")
	_, err = c.images.RemoveImage(t.Context(), &agentv1.RemoveImageRequest{Reference: "used"})
	wantError(t, err, codes.FailedPrecondition, "WRONG_STATE", "")
	for _, id := range []string{"", "one"} {
		_, err = c.images.RemoveImage(t.Context(), &agentv1.RemoveImageRequest{Reference: "none", RequestId: id})
		wantError(t, err, codes.NotFound, "NOT_FOUND", "")
		if _, err = c.images.RemoveImage(t.Context(), &agentv1.RemoveImageRequest{
			Reference: "none", AllowMissing: true,
		}); err != nil {
			t.Error(err)
		}
	}
	for range 2 { // the second is answered from the first
		if _, err = c.images.RemoveImage(t.Context(), &agentv1.RemoveImageRequest{Reference: "web", RequestId: "two"}); err != nil {
			t.Error(err)
		}
	}
}
