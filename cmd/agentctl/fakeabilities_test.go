package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

func (f *fakeAgent) PauseSandbox(_ context.Context, req *agentv1.PauseSandboxRequest) (*agentv1.PauseSandboxResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	running := s.running != nil
	f.mu.Unlock()
	if !running {
		return nil, fail(fmt.Errorf("pause %s: it is stopped: %w", req.GetName(), sandbox.ErrState), req.GetName())
	}
	return &agentv1.PauseSandboxResponse{Sandbox: s.set(func(st *agentv1.SandboxStatus) {
		st.Phase, st.Reason = agentv1.Phase_PHASE_PAUSED, "PAUSED"
	})}, nil
}

func (f *fakeAgent) ResumeSandbox(_ context.Context, req *agentv1.ResumeSandboxRequest) (*agentv1.ResumeSandboxResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	return &agentv1.ResumeSandboxResponse{Sandbox: s.resumed()}, nil
}

func (f *fakeAgent) HibernateSandbox(_ context.Context, req *agentv1.HibernateSandboxRequest) (*agentv1.HibernateSandboxResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	running := s.running != nil
	s.running = nil
	f.mu.Unlock()
	if !running {
		return nil, fail(fmt.Errorf("hibernate %s: it is stopped: %w", req.GetName(), sandbox.ErrState), req.GetName())
	}
	return &agentv1.HibernateSandboxResponse{Sandbox: s.set(func(st *agentv1.SandboxStatus) { st.Phase = agentv1.Phase_PHASE_HIBERNATED })}, nil
}

func (f *fakeAgent) CreateDiskSnapshot(_ context.Context, req *agentv1.CreateDiskSnapshotRequest) (*agentv1.CreateDiskSnapshotResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.running != nil {
		return nil, fail(fmt.Errorf("snapshot a disk of %s: it is ready; stop it first: %w", req.GetName(), sandbox.ErrState), req.GetName())
	}
	made := &agentv1.DiskSnapshot{Id: fmt.Sprint("copy-", len(f.snapshots)+1), CreateTime: timestamppb.Now(), SizeBytes: 64 << 20}
	f.snapshots = append([]*agentv1.DiskSnapshot{made}, f.snapshots...)
	return &agentv1.CreateDiskSnapshotResponse{Snapshot: made}, nil
}

func (f *fakeAgent) ListDiskSnapshots(_ context.Context, req *agentv1.ListDiskSnapshotsRequest) (*agentv1.ListDiskSnapshotsResponse, error) {
	if _, err := f.get(req.GetName()); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return &agentv1.ListDiskSnapshotsResponse{Snapshots: f.snapshots}, nil
}

func (f *fakeAgent) RestoreDiskSnapshot(_ context.Context, req *agentv1.RestoreDiskSnapshotRequest) (*agentv1.RestoreDiskSnapshotResponse, error) {
	if _, err := f.get(req.GetName()); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.snapshots {
		if s.GetId() == req.GetSnapshot() {
			return &agentv1.RestoreDiskSnapshotResponse{}, nil
		}
	}
	return nil, fail(sandbox.Invalidf("snapshot", "%q is none of this disk's", req.GetSnapshot()), req.GetName())
}

func (s *fakeSandbox) resumed() *agentv1.Sandbox {
	return s.set(func(st *agentv1.SandboxStatus) {
		if st.GetPhase() == agentv1.Phase_PHASE_PAUSED {
			st.Phase, st.Reason = agentv1.Phase_PHASE_READY, ""
		}
	})
}

// AttachConsole is a console that says what is typed.
func (f *fakeAgent) AttachConsole(stream grpc.BidiStreamingServer[agentv1.AttachConsoleRequest, agentv1.AttachConsoleResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	name := first.GetOpen().GetName()
	s, err := f.get(name)
	if err != nil {
		return err
	}
	f.mu.Lock()
	running, ended := s.running != nil, s.ended
	f.mu.Unlock()
	if !running {
		return fail(fmt.Errorf("console of %s: it is stopped: %w", name, sandbox.ErrState), name)
	}
	say := func(data []byte) error {
		return stream.Send(&agentv1.AttachConsoleResponse{Message: &agentv1.AttachConsoleResponse_Data{Data: data}})
	}
	err = stream.Send(&agentv1.AttachConsoleResponse{Message: &agentv1.AttachConsoleResponse_Opened{
		Opened: &agentv1.ConsoleOpened{Generation: s.sb.GetStatus().GetGeneration()},
	}})
	if err = errors.Join(err, say([]byte("console of "+name+"\n"))); err != nil {
		return err
	}
	left := make(chan error, 1)
	go func() {
		for {
			req, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return
			}
			if err == nil {
				err = say(req.GetData())
			}
			if err != nil {
				left <- err
				return
			}
		}
	}()
	select {
	case err := <-left:
		return err
	case <-ended:
		return nil
	}
}

// ListRefusals tells of a sandbox that denies something that it was refused it.
func (f *fakeAgent) ListRefusals(_ context.Context, req *agentv1.ListRefusalsRequest) (*agentv1.ListRefusalsResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	answer := &agentv1.ListRefusalsResponse{}
	if mode := s.sb.GetSpec().GetEgress().GetMode(); mode == agentv1.Egress_MODE_LIST || mode == agentv1.Egress_MODE_DENY {
		at := timestamppb.New(time.Now().Add(-3 * time.Hour))
		answer.TotalCount = 5
		answer.Refusals = []*agentv1.Refusal{
			{Kind: agentv1.Refusal_KIND_DNS, Destination: "evil.example\x1b[31m", Count: 4, LastTime: at},
			{Kind: agentv1.Refusal_KIND_TCP, Destination: "192.0.2.1", Port: 443, Count: 1, LastTime: at},
		}
	}
	return answer, nil
}
