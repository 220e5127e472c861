package server

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

// silent is a client that sends one message and then nothing.
type silent struct {
	grpc.ServerStream
	ctx  context.Context
	once sync.Once
}

func (s *silent) Context() context.Context                      { return s.ctx }
func (s *silent) SendAndClose(*agentv1.LoadImageResponse) error { return nil }
func (s *silent) Recv() (msg *agentv1.LoadImageRequest, err error) {
	s.once.Do(func() { msg = &agentv1.LoadImageRequest{Part: &agentv1.LoadImageRequest_Data{Data: []byte("x")}} })
	if msg == nil {
		<-s.ctx.Done()
		err = s.ctx.Err()
	}
	return msg, err
}

// reader is a store that reads, and takes its time before it does.
type reader struct {
	sandbox.ImageStore
	pause time.Duration
}

func (r reader) LoadImage(_ context.Context, archive io.Reader) ([]sandbox.Image, error) {
	time.Sleep(r.pause)
	_, err := io.Copy(io.Discard, archive)
	return nil, err
}

func TestStalledArchiveIsGivenUp(t *testing.T) {
	t.Parallel()
	for _, pause := range []time.Duration{0, 10 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			ctx, leave := context.WithCancel(t.Context())
			defer leave() // what returning from the handler does to the stream
			var work sync.WaitGroup
			s := &imageService{limits: loadLimits{}.orDefault(), life: t.Context(), work: &work}
			begun := time.Now()
			_, err := s.receiveInto(ctx, &silent{ctx: ctx}, 10, reader{pause: pause})
			if !errors.Is(err, sandbox.ErrTimeout) {
				t.Errorf("error = %v", err)
			}
			// Only the client's silence counts, not the store's.
			if took := time.Since(begun); took != pause+time.Minute {
				t.Errorf("given up after %s", took)
			}
			leave()
			work.Wait()
		})
	}
}

func TestLoadHasABound(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, leave := context.WithCancel(t.Context())
		defer leave()
		var work sync.WaitGroup
		s := &imageService{limits: loadLimits{stall: 48 * time.Hour}.orDefault(), life: t.Context(), work: &work}
		begun := time.Now()
		_, err := s.receiveInto(ctx, &silent{ctx: ctx}, 10, reader{})
		if !errors.Is(err, sandbox.ErrTimeout) || time.Since(begun) != time.Hour {
			t.Errorf("after %s: %v", time.Since(begun), err)
		}
		leave()
		work.Wait()
	})
}
