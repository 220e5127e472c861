package server

import (
	"context"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

func (s *sandboxService) PauseSandbox(
	ctx context.Context, req *agentv1.PauseSandboxRequest,
) (*agentv1.PauseSandboxResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, _ manager.Request) (*agentv1.PauseSandboxResponse, error) {
			sb, err := s.manager.Pause(ctx, req.GetName())
			if err != nil {
				return nil, err
			}
			return &agentv1.PauseSandboxResponse{Sandbox: sandboxToWire(sb)}, nil
		})
}

func (s *sandboxService) ResumeSandbox(
	ctx context.Context, req *agentv1.ResumeSandboxRequest,
) (*agentv1.ResumeSandboxResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, _ manager.Request) (*agentv1.ResumeSandboxResponse, error) {
			sb, err := s.manager.Resume(ctx, req.GetName())
			if err != nil {
				return nil, err
			}
			return &agentv1.ResumeSandboxResponse{Sandbox: sandboxToWire(sb)}, nil
		})
}

func (s *sandboxService) HibernateSandbox(
	ctx context.Context, req *agentv1.HibernateSandboxRequest,
) (*agentv1.HibernateSandboxResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, _ manager.Request) (*agentv1.HibernateSandboxResponse, error) {
			sb, err := s.manager.Hibernate(ctx, req.GetName())
			if err != nil {
				return nil, err
			}
			return &agentv1.HibernateSandboxResponse{Sandbox: sandboxToWire(sb)}, nil
		})
}
