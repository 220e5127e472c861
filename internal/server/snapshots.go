package server

import (
	"context"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

func (s *sandboxService) CreateDiskSnapshot(
	ctx context.Context, req *agentv1.CreateDiskSnapshotRequest,
) (*agentv1.CreateDiskSnapshotResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, _ manager.Request) (*agentv1.CreateDiskSnapshotResponse, error) {
			made, err := s.manager.SnapshotDisk(ctx, req.GetName(), req.GetTarget())
			if err != nil {
				return nil, err
			}
			return &agentv1.CreateDiskSnapshotResponse{Snapshot: snapshotToWire(made)}, nil
		})
}

func (s *sandboxService) ListDiskSnapshots(
	ctx context.Context, req *agentv1.ListDiskSnapshotsRequest,
) (*agentv1.ListDiskSnapshotsResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	found, err := s.manager.DiskSnapshots(ctx, req.GetName(), req.GetTarget())
	if err != nil {
		return nil, err
	}
	answer := &agentv1.ListDiskSnapshotsResponse{}
	for _, snapshot := range found {
		answer.Snapshots = append(answer.Snapshots, snapshotToWire(snapshot))
	}
	return answer, nil
}

func (s *sandboxService) RestoreDiskSnapshot(
	ctx context.Context, req *agentv1.RestoreDiskSnapshotRequest,
) (*agentv1.RestoreDiskSnapshotResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	if req.GetSnapshot() == "" {
		return nil, sandbox.Invalidf("snapshot", "is missing")
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, _ manager.Request) (*agentv1.RestoreDiskSnapshotResponse, error) {
			if err := s.manager.RestoreDisk(ctx, req.GetName(), req.GetTarget(), req.GetSnapshot()); err != nil {
				return nil, err
			}
			return &agentv1.RestoreDiskSnapshotResponse{}, nil
		})
}

func snapshotToWire(s sandbox.DiskSnapshot) *agentv1.DiskSnapshot {
	return &agentv1.DiskSnapshot{Id: s.ID, CreateTime: timeToWire(s.CreatedAt), SizeBytes: s.SizeBytes}
}
