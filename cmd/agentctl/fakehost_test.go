package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/version"
)

// LoadImage takes any tar whose length is as announced for an archive of one
// image, named after its first file.
func (f *fakeAgent) LoadImage(stream grpc.ClientStreamingServer[agentv1.LoadImageRequest, agentv1.LoadImageResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	header := first.GetHeader()
	f.mu.Lock()
	cut := f.cut
	f.cut = false
	f.mu.Unlock()
	if cut {
		go func() {
			f.stop()
			_ = f.start()
		}()
		<-stream.Context().Done()
		return stream.Context().Err()
	}
	reader, writer := io.Pipe()
	var total uint64
	go func() {
		for {
			part, err := stream.Recv()
			if err != nil {
				writer.CloseWithError(err) // io.EOF at the end
				return
			}
			total += uint64(len(part.GetData()))
			if _, err := writer.Write(part.GetData()); err != nil {
				return
			}
		}
	}()
	entry, err := tar.NewReader(reader).Next()
	if err != nil {
		reader.CloseWithError(err)
		return fail(fmt.Errorf("archive: %w: %w", sandbox.ErrCorrupt, err), "")
	}
	if _, err := io.Copy(io.Discard, reader); err != nil {
		return err
	}
	if want := header.GetSizeBytes(); want != 0 && total != want {
		return fail(fmt.Errorf("archive: %d bytes of %d: %w", total, want, sandbox.ErrCorrupt), "")
	}
	image := &agentv1.Image{Id: "sha256:" + fmt.Sprintf("%064x", total), Names: []string{"localhost/" + entry.Name}, SizeBytes: total}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.images = append(f.images, image)
	return stream.SendAndClose(&agentv1.LoadImageResponse{Images: []*agentv1.Image{image}})
}

func (f *fakeAgent) PullImage(req *agentv1.PullImageRequest, stream grpc.ServerStreamingServer[agentv1.PullImageResponse]) error {
	if req.GetReference() == "localhost/none:1" {
		return fail(fmt.Errorf("pull %s: manifest unknown: %w", req.GetReference(), sandbox.ErrNotFound), "")
	}
	if err := stream.Send(&agentv1.PullImageResponse{Progress: "Copying blob 1 of 1"}); err != nil {
		return err
	}
	image := &agentv1.Image{Id: "sha256:" + fmt.Sprintf("%064x", 7), Names: []string{req.GetReference()}, SizeBytes: 3 << 20}
	f.mu.Lock()
	f.images = append(f.images, image)
	f.mu.Unlock()
	return stream.Send(&agentv1.PullImageResponse{Image: image})
}

func (f *fakeAgent) ListImages(context.Context, *agentv1.ListImagesRequest) (*agentv1.ListImagesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &agentv1.ListImagesResponse{Images: slices.Clone(f.images)}, nil
}

func (f *fakeAgent) RemoveImage(_ context.Context, req *agentv1.RemoveImageRequest) (*agentv1.RemoveImageResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.sandboxes {
		if s.sb.GetSpec().GetImage() == req.GetReference() {
			return nil, fail(fmt.Errorf("remove %s: sandbox %s uses it: %w", req.GetReference(), s.sb.GetName(), sandbox.ErrState), "")
		}
	}
	before := len(f.images)
	f.images = slices.DeleteFunc(f.images, func(i *agentv1.Image) bool { return slices.Contains(i.GetNames(), req.GetReference()) })
	if len(f.images) == before && !req.GetAllowMissing() {
		return nil, fail(fmt.Errorf("image %s: %w", req.GetReference(), sandbox.ErrNotFound), "")
	}
	return &agentv1.RemoveImageResponse{}, nil
}

func (f *fakeAgent) GetInfo(context.Context, *agentv1.GetInfoRequest) (*agentv1.GetInfoResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &agentv1.GetInfoResponse{
		AgentVersion: version.String(), Hostname: "testhost", Os: "linux", Arch: "amd64", Cpus: 4, MemoryMib: 16 << 10,
		Drivers: []*agentv1.DriverInfo{
			{Name: "fake", Available: true, Version: "1.0", Abilities: []string{"logs", "images"}, LimitsMemory: true},
			{Name: "broken", Reason: "its socket is missing", Cure: "systemctl --user enable --now broken.socket"},
		},
		DefaultDriver:  "fake",
		MachineClasses: []*agentv1.MachineClass{{Name: "small", Resources: &agentv1.Resources{CpuMillis: 500, MemoryMib: 512}}},
		StartTime:      timestamppb.New(time.Now().Add(-time.Hour)),
		Draining:       f.draining, MaxConcurrentBoots: 4, MaxRunning: 200, Reconciled: true,
	}, nil
}

func (f *fakeAgent) GetStats(context.Context, *agentv1.GetStatsRequest) (*agentv1.GetStatsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	counts := map[agentv1.Phase]uint32{}
	for _, s := range f.sandboxes {
		counts[s.sb.GetStatus().GetPhase()]++
	}
	stats := &agentv1.GetStatsResponse{
		MemoryTotalMib: 16 << 10, MemoryAvailableMib: 4 << 10, LoadAverage: []float64{0.5, 0.25, 0.1}, AgentMemoryBytes: 20 << 20,
	}
	for phase, count := range counts {
		stats.Sandboxes = append(stats.Sandboxes, &agentv1.GetStatsResponse_PhaseCount{Phase: phase, Count: count})
	}
	return stats, nil
}

func (f *fakeAgent) Drain(_ context.Context, req *agentv1.DrainRequest) (*agentv1.DrainResponse, error) {
	f.mu.Lock()
	f.draining = true
	var running []*fakeSandbox
	for _, s := range f.sandboxes {
		if s.running != nil {
			running = append(running, s)
		}
	}
	f.mu.Unlock()
	if !req.GetStopSandboxes() {
		return &agentv1.DrainResponse{}, nil
	}
	for _, s := range running {
		s.kill()
	}
	return &agentv1.DrainResponse{Stopped: uint32(len(running))}, nil
}

func (f *fakeAgent) Undrain(context.Context, *agentv1.UndrainRequest) (*agentv1.UndrainResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.draining = false
	return &agentv1.UndrainResponse{}, nil
}

// errGone is a refusal for tests that ask for one.
var errGone = fail(&sandbox.UnavailableError{Err: errors.New("podman does not answer"), Cure: "systemctl --user restart podman.socket"}, "web")
