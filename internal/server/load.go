package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

// maxChunk is what one message of an archive may hold, see LoadImageRequest.
const maxChunk = 1 << 20

// loadLimits bound the loading of an archive. Zero: the default.
type loadLimits struct {
	bytes uint64        // default 16 GiB
	stall time.Duration // between two messages; default 1 min
	total time.Duration // default 1 h
}

func (l loadLimits) orDefault() loadLimits {
	if l.bytes == 0 {
		l.bytes = 16 << 30
	}
	if l.stall == 0 {
		l.stall = time.Minute
	}
	if l.total == 0 {
		l.total = time.Hour
	}
	return l
}

// LoadImage passes an archive on to an image store as it arrives. As long as
// the archive has not arrived whole, a caller that leaves ends it; from then
// on it is a mutation like any other.
func (s *imageService) LoadImage(stream agentv1.ImageService_LoadImageServer) error {
	first, err := stream.Recv()
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	header := first.GetHeader()
	if header == nil {
		return sandbox.Invalidf("header", "is missing; the first message holds the header")
	}
	if err := refuseUnknown(header.ProtoReflect(), "header"); err != nil {
		return err
	}
	if size := header.GetSizeBytes(); size > s.limits.bytes {
		return sandbox.Invalidf("header.size_bytes", "%d is more than the %d that this agent takes", size, s.limits.bytes)
	}
	images, err := s.manager.Images(header.GetDriver())
	if err != nil {
		return err
	}
	answer, err := s.load(stream, header, images)
	if err != nil {
		return err
	}
	return stream.SendAndClose(answer)
}

// load runs one load under the header's request id. It returns only once
// nothing reads the stream any more.
func (s *imageService) load(
	stream agentv1.ImageService_LoadImageServer, header *agentv1.LoadImageRequest_Header, images sandbox.ImageStore,
) (*agentv1.LoadImageResponse, error) {
	// Once leaves with its caller, and may then still be about to run; so
	// whoever comes first of the two takes the stream.
	var taken atomic.Bool
	finished := make(chan struct{})
	answer, err := once(stream.Context(), s.manager, header.GetRequestId(), header,
		func(ctx context.Context, _ manager.Request) (*agentv1.LoadImageResponse, error) {
			if !taken.CompareAndSwap(false, true) {
				return nil, context.Canceled
			}
			defer close(finished)
			list, err := s.receiveInto(ctx, stream, header.GetSizeBytes(), images)
			if err != nil {
				return nil, err
			}
			return &agentv1.LoadImageResponse{Images: imagesToWire(list)}, nil
		})
	if !taken.CompareAndSwap(false, true) {
		<-finished
	}
	return answer, err
}

// receiveInto feeds the archive to the store through a pipe. Whatever is wrong
// with the archive ends the pipe with an error, so that the store, which reads
// to the end before it adds anything, adds nothing.
func (s *imageService) receiveInto(
	ctx context.Context, stream agentv1.ImageService_LoadImageServer, declared uint64, images sandbox.ImageStore,
) ([]sandbox.Image, error) {
	ctx, done := s.outlive(ctx, s.limits.total)
	defer done()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	reader, writer := io.Pipe()
	stop := context.AfterFunc(ctx, func() { writer.CloseWithError(context.Cause(ctx)) })
	defer stop()

	received := make(chan error, 1)
	// A client that stalls is given up by returning from the call, which ends
	// the Recv that this goroutine may hang in; hence it is not waited for
	// here but by the server.
	s.work.Go(func() {
		err := s.receive(stream, writer, declared, func() {
			fail(fmt.Errorf("archive: nothing was sent for %s: %w", s.limits.stall, sandbox.ErrTimeout))
		})
		if err != nil {
			fail(err)
		}
		writer.CloseWithError(err) // nil: io.EOF
		received <- err
	})

	list, err := images.LoadImage(ctx, reader)
	// What the store left unread is still part of the archive.
	if err == nil {
		_, err = io.Copy(io.Discard, reader)
	}
	reader.CloseWithError(io.ErrClosedPipe)
	if cause := context.Cause(ctx); cause != nil {
		return nil, cause
	}
	if err != nil {
		return nil, err
	}
	select {
	case err := <-received:
		return list, err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// receive writes the archive's messages until the stream ends and checks its
// length. stalled is called if the client sends nothing for too long.
func (s *imageService) receive(
	stream agentv1.ImageService_LoadImageServer, archive io.Writer, declared uint64, stalled func(),
) error {
	var size uint64
	timer := time.AfterFunc(s.limits.stall, stalled)
	defer timer.Stop()
	for {
		timer.Reset(s.limits.stall)
		msg, err := stream.Recv()
		timer.Stop() // the store may take its time
		if errors.Is(err, io.EOF) {
			if declared != 0 && size < declared {
				return corrupt("is truncated: %d bytes were sent of the %d announced", size, declared)
			}
			return nil
		}
		if err != nil {
			return err
		}
		part, ok := msg.GetPart().(*agentv1.LoadImageRequest_Data)
		if !ok {
			return sandbox.Invalidf("data", "is missing; all messages but the first hold data")
		}
		if len(part.Data) > maxChunk {
			return sandbox.Invalidf("data", "is %d bytes long; a message holds at most %d", len(part.Data), maxChunk)
		}
		size += uint64(len(part.Data))
		if declared != 0 && size > declared {
			return corrupt("is longer than the %d bytes announced", declared)
		}
		if size > s.limits.bytes {
			return sandbox.Invalidf("data", "is longer than the %d bytes that this agent takes", s.limits.bytes)
		}
		if _, err := archive.Write(part.Data); errors.Is(err, io.ErrClosedPipe) {
			return nil // the store said why
		} else if err != nil {
			return err
		}
	}
}

func corrupt(format string, args ...any) error {
	return &sandbox.FieldError{Field: "data", Problem: fmt.Sprintf(format, args...), Err: sandbox.ErrCorrupt}
}
