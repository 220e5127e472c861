package server

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

// Bounds of what image stores are asked to do, since a backend may hang.
const (
	listTimeout   = 30 * time.Second
	removeTimeout = 2 * time.Minute
	pullTimeout   = 30 * time.Minute
)

type imageService struct {
	agentv1.UnimplementedImageServiceServer
	manager *manager.Manager
	limits  loadLimits
	// life ends when the server no longer waits for work; work is all that may
	// outlive its request.
	life context.Context
	work *sync.WaitGroup
}

// outlive returns a context that goes on when ctx ends, and ends with the
// server or after the timeout.
func (s *imageService) outlive(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(s.life, func() { cancel(errStopping) })
	timer := time.AfterFunc(timeout, func() { cancel(fmt.Errorf("%w after %s", sandbox.ErrTimeout, timeout)) })
	return ctx, func() { timer.Stop(); stop(); cancel(nil) }
}

func (s *imageService) ListImages(
	ctx context.Context, req *agentv1.ListImagesRequest,
) (*agentv1.ListImagesResponse, error) {
	images, err := s.manager.Images(req.GetDriver())
	if err != nil {
		return nil, err
	}
	ctx, cancel := s.outlive(ctx, listTimeout)
	defer cancel()
	list, err := images.Images(ctx)
	if err != nil {
		return nil, ended(ctx, err)
	}
	return &agentv1.ListImagesResponse{Images: imagesToWire(list)}, nil
}

func (s *imageService) RemoveImage(
	ctx context.Context, req *agentv1.RemoveImageRequest,
) (*agentv1.RemoveImageResponse, error) {
	if req.GetReference() == "" {
		return nil, sandbox.Invalidf("reference", "is missing; give an image's name or id")
	}
	images, err := s.manager.Images(req.GetDriver())
	if err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, _ manager.Request) (*agentv1.RemoveImageResponse, error) {
			ctx, cancel := s.outlive(ctx, removeTimeout)
			defer cancel()
			err := images.RemoveImage(ctx, req.GetReference())
			if errors.Is(err, sandbox.ErrNotFound) && req.GetAllowMissing() {
				err = nil
			}
			if err != nil {
				return nil, ended(ctx, err)
			}
			return &agentv1.RemoveImageResponse{}, nil
		})
}

// PullImage goes on when its caller leaves, as every mutation does.
func (s *imageService) PullImage(req *agentv1.PullImageRequest, stream agentv1.ImageService_PullImageServer) error {
	if req.GetReference() == "" {
		return sandbox.Invalidf("reference", "is missing; give a fully qualified image reference")
	}
	images, err := s.manager.Images(req.GetDriver())
	if err != nil {
		return err
	}
	// Lines are for people: what a slow reader has no room for is left out.
	lines := make(chan string, 64)
	type result struct {
		answer *agentv1.PullImageResponse
		err    error
	}
	done := make(chan result, 1)
	s.work.Go(func() {
		var r result
		defer func() { done <- r }()
		defer recovered(&r.err)
		r.answer, r.err = once(context.WithoutCancel(stream.Context()), s.manager, req.GetRequestId(), req,
			func(ctx context.Context, _ manager.Request) (*agentv1.PullImageResponse, error) {
				ctx, cancel := s.outlive(ctx, pullTimeout)
				defer cancel()
				image, err := images.PullImage(ctx, req.GetReference(), func(line string) {
					select {
					case lines <- line:
					default:
					}
				})
				if err != nil {
					return nil, ended(ctx, err)
				}
				return &agentv1.PullImageResponse{Image: imageToWire(image)}, nil
			})
	})
	for {
		select {
		case line := <-lines:
			if err := stream.Send(&agentv1.PullImageResponse{Progress: validUTF8(line)}); err != nil {
				return err
			}
		case r := <-done:
			if r.err != nil {
				return r.err
			}
			for len(lines) > 0 {
				if err := stream.Send(&agentv1.PullImageResponse{Progress: validUTF8(<-lines)}); err != nil {
					return err
				}
			}
			return stream.Send(r.answer)
		case <-stream.Context().Done():
			return context.Cause(stream.Context())
		}
	}
}

// ended tells why a context of outlive's ended, if that is behind err.
func ended(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
		return fmt.Errorf("%w: %w", cause, err)
	}
	return err
}
