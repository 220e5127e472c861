package server

import (
	"context"
	"errors"
	"fmt"
	"math"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

const (
	maxPageSize = 1000
	// maxPageBytes keeps a page below the 4 MiB that gRPC clients accept by
	// default, the largest sandbox included.
	maxPageBytes = 2 << 20
)

type sandboxService struct {
	agentv1.UnimplementedSandboxServiceServer
	manager *manager.Manager
}

func (s *sandboxService) CreateSandbox(
	ctx context.Context, req *agentv1.CreateSandboxRequest,
) (*agentv1.CreateSandboxResponse, error) {
	create, err := createFromWire(req.GetSandbox())
	if err != nil {
		return nil, err
	}
	if err := checkValues("secret_values", req.GetSecretValues()); err != nil {
		return nil, err
	}
	create.SecretValues = req.GetSecretValues()
	create.Start = req.GetStart()
	create.ValidateOnly = req.GetValidateOnly()
	run := func(ctx context.Context, request manager.Request) (*agentv1.CreateSandboxResponse, error) {
		create.Request = request
		sb, err := s.manager.Create(ctx, create)
		if err != nil {
			return nil, err
		}
		return &agentv1.CreateSandboxResponse{Sandbox: sandboxToWire(sb)}, nil
	}
	if create.ValidateOnly { // nothing is done, so nothing is to be kept
		if err := checkRequestID(req.GetRequestId()); err != nil {
			return nil, err
		}
		return run(ctx, manager.Request{})
	}
	return once(ctx, s.manager, req.GetRequestId(), req, run)
}

// createFromWire converts what a caller may say of a new sandbox.
func createFromWire(w *agentv1.Sandbox) (manager.CreateRequest, error) {
	if w == nil {
		return manager.CreateRequest{}, sandbox.Invalidf("sandbox", "is missing")
	}
	if err := sandbox.ValidateName("name", w.GetName()); err != nil {
		return manager.CreateRequest{}, err
	}
	spec, err := specFromWire(w.GetSpec())
	if err != nil {
		return manager.CreateRequest{}, err
	}
	return manager.CreateRequest{Name: w.GetName(), Spec: spec, Labels: w.GetLabels()}, nil
}

func (s *sandboxService) EnsureSandbox(
	ctx context.Context, req *agentv1.EnsureSandboxRequest,
) (*agentv1.EnsureSandboxResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	var create *manager.CreateRequest
	if w := req.GetSandbox(); w != nil {
		named := w
		if w.GetName() == "" {
			named = proto.CloneOf(w)
			named.Name = req.GetName()
		}
		if named.GetName() != req.GetName() {
			return nil, sandbox.Invalidf("sandbox.name", "is neither empty nor the name of the request, %q", req.GetName())
		}
		converted, err := createFromWire(named)
		if err != nil {
			return nil, err
		}
		converted.SecretValues = req.GetSecretValues()
		create = &converted
	}
	if err := checkValues("secret_values", req.GetSecretValues()); err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, request manager.Request) (*agentv1.EnsureSandboxResponse, error) {
			if create != nil {
				create.Request = request
			}
			if err := s.keepValues(req.GetName(), req.GetSecretValues(), create != nil); err != nil {
				return nil, err
			}
			sb, err := s.manager.Ensure(ctx, req.GetName(), create)
			if err != nil {
				return nil, err
			}
			return &agentv1.EnsureSandboxResponse{Sandbox: sandboxToWire(sb)}, nil
		})
}

func (s *sandboxService) StartSandbox(
	ctx context.Context, req *agentv1.StartSandboxRequest,
) (*agentv1.StartSandboxResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	if err := checkValues("secret_values", req.GetSecretValues()); err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, _ manager.Request) (*agentv1.StartSandboxResponse, error) {
			if err := s.keepValues(req.GetName(), req.GetSecretValues(), false); err != nil {
				return nil, err
			}
			sb, err := s.manager.Start(ctx, req.GetName())
			if err != nil {
				return nil, err
			}
			return &agentv1.StartSandboxResponse{Sandbox: sandboxToWire(sb)}, nil
		})
}

// keepValues keeps values of secrets for the boot that may follow. absentOK:
// the sandbox may be about to be made, which keeps them itself.
func (s *sandboxService) keepValues(name string, values map[string][]byte, absentOK bool) error {
	if len(values) == 0 {
		return nil
	}
	err := s.manager.KeepSecrets(name, values)
	if absentOK && errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	return err
}

func (s *sandboxService) StopSandbox(
	ctx context.Context, req *agentv1.StopSandboxRequest,
) (*agentv1.StopSandboxResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	grace, err := graceFromWire(req.GetGrace())
	if err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, _ manager.Request) (*agentv1.StopSandboxResponse, error) {
			sb, err := s.manager.Stop(ctx, req.GetName(), grace)
			if err != nil {
				return nil, err
			}
			return &agentv1.StopSandboxResponse{Sandbox: sandboxToWire(sb)}, nil
		})
}

func (s *sandboxService) RestartSandbox(
	ctx context.Context, req *agentv1.RestartSandboxRequest,
) (*agentv1.RestartSandboxResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	grace, err := graceFromWire(req.GetGrace())
	if err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, request manager.Request) (*agentv1.RestartSandboxResponse, error) {
			sb, err := s.manager.Restart(ctx, req.GetName(), grace, request)
			if err != nil {
				return nil, err
			}
			return &agentv1.RestartSandboxResponse{Sandbox: sandboxToWire(sb)}, nil
		})
}

func (s *sandboxService) DeleteSandbox(
	ctx context.Context, req *agentv1.DeleteSandboxRequest,
) (*agentv1.DeleteSandboxResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	grace, err := graceFromWire(req.GetGrace())
	if err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, request manager.Request) (*agentv1.DeleteSandboxResponse, error) {
			if err := s.manager.Delete(ctx, req.GetName(), grace, req.GetAllowMissing(), request); err != nil {
				return nil, err
			}
			return &agentv1.DeleteSandboxResponse{}, nil
		})
}

func (s *sandboxService) TouchSandbox(
	ctx context.Context, req *agentv1.TouchSandboxRequest,
) (*agentv1.TouchSandboxResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, _ manager.Request) (*agentv1.TouchSandboxResponse, error) {
			at, err := s.manager.Touch(ctx, req.GetName())
			if err != nil {
				return nil, err
			}
			return &agentv1.TouchSandboxResponse{LastActivityTime: timeToWire(at)}, nil
		})
}

func (s *sandboxService) UpdateSandbox(
	ctx context.Context, req *agentv1.UpdateSandboxRequest,
) (*agentv1.UpdateSandboxResponse, error) {
	update, err := updateFromWire(req)
	if err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, _ manager.Request) (*agentv1.UpdateSandboxResponse, error) {
			sb, err := s.manager.Update(ctx, update)
			if err != nil {
				return nil, err
			}
			return &agentv1.UpdateSandboxResponse{Sandbox: sandboxToWire(sb)}, nil
		})
}

func updateFromWire(req *agentv1.UpdateSandboxRequest) (manager.UpdateRequest, error) {
	w := req.GetSandbox()
	if w == nil {
		return manager.UpdateRequest{}, sandbox.Invalidf("sandbox", "is missing")
	}
	if err := sandbox.ValidateName("name", w.GetName()); err != nil {
		return manager.UpdateRequest{}, err
	}
	paths := req.GetUpdateMask().GetPaths()
	if len(paths) == 0 {
		return manager.UpdateRequest{}, sandbox.Invalidf("update_mask", "is missing; name what to change of labels, spec.idle and spec.egress")
	}
	update := manager.UpdateRequest{Name: w.GetName()}
	for _, path := range paths {
		switch path {
		case "labels":
			labels := w.GetLabels()
			update.Labels = &labels
		case "spec.idle":
			idle, err := idleFromWire(w.GetSpec().GetIdle())
			if err != nil {
				return manager.UpdateRequest{}, err
			}
			update.Idle = &idle
		case "spec.egress":
			egress, err := egressFromWire(w.GetSpec().GetEgress())
			if err != nil {
				return manager.UpdateRequest{}, err
			}
			update.Egress = &egress
		default:
			return manager.UpdateRequest{}, sandbox.Invalidf("update_mask", "%.80q cannot be changed; labels, spec.idle and spec.egress can", path)
		}
	}
	return update, nil
}

func (s *sandboxService) GetSandbox(
	ctx context.Context, req *agentv1.GetSandboxRequest,
) (*agentv1.GetSandboxResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	sb, err := s.manager.Sandbox(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	return &agentv1.GetSandboxResponse{Sandbox: sandboxToWire(sb)}, nil
}

func (s *sandboxService) ListSandboxes(
	ctx context.Context, req *agentv1.ListSandboxesRequest,
) (*agentv1.ListSandboxesResponse, error) {
	limit := int(req.GetPageSize())
	if limit < 0 {
		return nil, sandbox.Invalidf("page_size", "%d is negative", limit)
	}
	if limit == 0 || limit > maxPageSize {
		limit = maxPageSize
	}
	selector, err := manager.ParseSelector(req.GetLabelSelector())
	if err != nil {
		return nil, err
	}
	after, err := parsePageToken(req.GetPageToken(), req.GetLabelSelector())
	if err != nil {
		return nil, err
	}
	page, more, err := s.manager.List(ctx, selector, after, limit)
	if err != nil {
		return nil, err
	}
	answer := &agentv1.ListSandboxesResponse{Sandboxes: make([]*agentv1.Sandbox, 0, len(page))}
	size := 0
	for i, sb := range page {
		w := sandboxToWire(sb)
		if size += proto.Size(w); size > maxPageBytes && i > 0 {
			page, more = page[:i], true
			break
		}
		answer.Sandboxes = append(answer.Sandboxes, w)
	}
	if more && len(page) > 0 {
		answer.NextPageToken = pageToken(page[len(page)-1].Name, req.GetLabelSelector())
	}
	return answer, nil
}

func (s *sandboxService) WatchSandboxes(
	req *agentv1.WatchSandboxesRequest, stream agentv1.SandboxService_WatchSandboxesServer,
) error {
	var opts manager.WatchOptions
	var err error
	if opts.Selector, err = manager.ParseSelector(req.GetLabelSelector()); err != nil {
		return err
	}
	if opts.Name = req.GetName(); opts.Name != "" {
		if err := sandbox.ValidateName("name", opts.Name); err != nil {
			return err
		}
	}
	if req.GetResumeVersion() != "" {
		if opts.Resume, err = manager.ParseVersion(req.GetResumeVersion()); err != nil {
			return err
		}
	}
	return s.manager.Watch(stream.Context(), opts, func(event manager.Event) error {
		return stream.Send(eventToWire(event))
	})
}

func eventToWire(event manager.Event) *agentv1.WatchSandboxesResponse {
	w := &agentv1.WatchSandboxesResponse{}
	switch {
	case event.Changed != nil:
		w.Event = &agentv1.WatchSandboxesResponse_Changed{Changed: sandboxToWire(event.Changed)}
	case event.Deleted != nil:
		w.Event = &agentv1.WatchSandboxesResponse_Deleted{
			Deleted: &agentv1.Sandbox{Name: event.Deleted.Name, Uid: event.Deleted.UID},
		}
	case event.Sync:
		w.Event = &agentv1.WatchSandboxesResponse_Sync_{Sync: &agentv1.WatchSandboxesResponse_Sync{}}
	case event.Reset:
		w.Event = &agentv1.WatchSandboxesResponse_Reset_{Reset_: &agentv1.WatchSandboxesResponse_Reset{}}
	}
	if event.Version != (manager.Version{}) {
		w.Version = event.Version.String()
	}
	return w
}

func (s *sandboxService) StreamSandboxLogs(
	req *agentv1.StreamSandboxLogsRequest, stream agentv1.SandboxService_StreamSandboxLogsServer,
) error {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return err
	}
	opts, err := logOptionsFromWire(req)
	if err != nil {
		return err
	}
	return s.manager.Logs(stream.Context(), req.GetName(), opts, func(entry sandbox.LogEntry) error {
		w := &agentv1.StreamSandboxLogsResponse{
			Stream: agentv1.LogStream_LOG_STREAM_STDOUT, Time: timeToWire(entry.Time), Data: entry.Data,
		}
		if entry.Stderr {
			w.Stream = agentv1.LogStream_LOG_STREAM_STDERR
		}
		return stream.Send(w) // encodes Data before it returns
	})
}

func logOptionsFromWire(req *agentv1.StreamSandboxLogsRequest) (sandbox.LogOptions, error) {
	opts := sandbox.LogOptions{Follow: req.GetFollow(), Tail: -1}
	if req.Tail != nil {
		opts.Tail = int(min(req.GetTail(), math.MaxInt32))
	}
	var err error
	if opts.Since, err = timeFromWire("since", req.GetSince()); err != nil {
		return opts, err
	}
	for i, stream := range req.GetStreams() {
		switch stream {
		case agentv1.LogStream_LOG_STREAM_STDOUT:
			opts.Stdout = true
		case agentv1.LogStream_LOG_STREAM_STDERR:
			opts.Stderr = true
		default:
			return opts, sandbox.Invalidf(fmt.Sprintf("streams[%d]", i), "%d is neither stdout nor stderr", int32(stream))
		}
	}
	if !opts.Stdout && !opts.Stderr {
		opts.Stdout, opts.Stderr = true, true
	}
	return opts, nil
}
