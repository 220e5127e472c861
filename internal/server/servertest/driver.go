// Package servertest reaches a driver the long way: client, API, manager,
// driver. Its Driver is the shape of sandbox.Driver over that way, so that the
// driver contract's tests can be run through all of it.
package servertest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

// Driver is a sandbox.Driver, Validator and LogSource that asks an agent.
type Driver struct {
	name      string
	sandboxes agentv1.SandboxServiceClient
	host      agentv1.HostServiceClient
}

var (
	_ sandbox.Driver    = (*Driver)(nil)
	_ sandbox.Validator = (*Driver)(nil)
	_ sandbox.LogSource = (*Driver)(nil)
)

// New returns the agent's driver of that name, as conn reaches it.
func New(conn grpc.ClientConnInterface, name string) *Driver {
	return &Driver{
		name:      name,
		sandboxes: agentv1.NewSandboxServiceClient(conn),
		host:      agentv1.NewHostServiceClient(conn),
	}
}

// Probe implements sandbox.Driver.
func (d *Driver) Probe(ctx context.Context) (sandbox.Report, error) {
	info, err := d.host.GetInfo(ctx, &agentv1.GetInfoRequest{})
	if err != nil {
		return sandbox.Report{}, domainError(err)
	}
	for _, w := range info.GetDrivers() {
		if w.GetName() != d.name {
			continue
		}
		if !w.GetAvailable() {
			return sandbox.Report{}, &sandbox.UnavailableError{Err: errors.New(w.GetReason()), Cure: w.GetCure()}
		}
		return sandbox.Report{
			Version:  w.GetVersion(),
			Limits:   sandbox.Limits{CPU: w.GetLimitsCpu(), Memory: w.GetLimitsMemory(), Pids: w.GetLimitsPids()},
			Warnings: w.GetWarnings(),
		}, nil
	}
	return sandbox.Report{}, fmt.Errorf("driver %s: %w", d.name, sandbox.ErrNotFound)
}

// List implements sandbox.Driver.
func (d *Driver) List(ctx context.Context) ([]string, error) {
	ids := []string{}
	for token := ""; ; {
		page, err := d.sandboxes.ListSandboxes(ctx, &agentv1.ListSandboxesRequest{PageToken: token, PageSize: 7})
		if err != nil {
			return nil, domainError(err)
		}
		for _, w := range page.GetSandboxes() {
			ids = append(ids, w.GetName())
		}
		if token = page.GetNextPageToken(); token == "" {
			return ids, nil
		}
	}
}

// Create implements sandbox.Driver.
func (d *Driver) Create(ctx context.Context, ref sandbox.Ref, spec sandbox.Spec) error {
	w, err := specToWire(spec)
	if err != nil {
		return err
	}
	_, err = d.sandboxes.CreateSandbox(ctx, &agentv1.CreateSandboxRequest{
		Sandbox: &agentv1.Sandbox{Name: ref.ID, Spec: w},
	})
	if err = domainError(err); errors.Is(err, sandbox.ErrExists) {
		return nil
	}
	return err
}

// Validate implements sandbox.Validator.
func (d *Driver) Validate(ctx context.Context, spec sandbox.Spec) error {
	w, err := specToWire(spec)
	if err != nil {
		return err
	}
	_, err = d.sandboxes.CreateSandbox(ctx, &agentv1.CreateSandboxRequest{
		Sandbox: &agentv1.Sandbox{Name: "validate-only", Spec: w}, ValidateOnly: true,
	})
	return domainError(err)
}

// Start implements sandbox.Driver.
func (d *Driver) Start(ctx context.Context, ref sandbox.Ref) error {
	_, err := d.sandboxes.StartSandbox(ctx, &agentv1.StartSandboxRequest{Name: ref.ID})
	if err = domainError(err); errors.Is(err, sandbox.ErrEnded) {
		return nil // of no concern to a driver
	}
	return err
}

// Stop implements sandbox.Driver.
func (d *Driver) Stop(ctx context.Context, ref sandbox.Ref, grace time.Duration) error {
	_, err := d.sandboxes.StopSandbox(ctx, &agentv1.StopSandboxRequest{Name: ref.ID, Grace: durationpb.New(grace)})
	if err = domainError(err); errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	return err
}

// Inspect implements sandbox.Driver.
func (d *Driver) Inspect(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
	answer, err := d.sandboxes.GetSandbox(ctx, &agentv1.GetSandboxRequest{Name: ref.ID})
	if err = domainError(err); errors.Is(err, sandbox.ErrNotFound) {
		return sandbox.Observation{State: sandbox.StateAbsent}, nil
	}
	if err != nil {
		return sandbox.Observation{}, err
	}
	return observation(answer.GetSandbox()), nil
}

// Wait implements sandbox.Driver.
func (d *Driver) Wait(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
	if err := sandbox.ValidateName("id", ref.ID); err != nil {
		return sandbox.Observation{}, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := d.sandboxes.WatchSandboxes(ctx, &agentv1.WatchSandboxesRequest{Name: ref.ID})
	if err != nil {
		return sandbox.Observation{}, domainError(err)
	}
	last := sandbox.Observation{State: sandbox.StateAbsent}
	synced := false
	for {
		response, err := stream.Recv()
		if err != nil {
			return sandbox.Observation{}, domainError(err)
		}
		switch event := response.GetEvent().(type) {
		case *agentv1.WatchSandboxesResponse_Changed:
			last = observation(event.Changed)
		case *agentv1.WatchSandboxesResponse_Deleted:
			last = sandbox.Observation{State: sandbox.StateAbsent}
		case *agentv1.WatchSandboxesResponse_Reset_:
			last, synced = sandbox.Observation{State: sandbox.StateAbsent}, false
		case *agentv1.WatchSandboxesResponse_Sync_:
			synced = true
		}
		if synced && last.State != sandbox.StateRunning {
			return last, nil
		}
	}
}

// Delete implements sandbox.Driver.
func (d *Driver) Delete(ctx context.Context, ref sandbox.Ref) error {
	_, err := d.sandboxes.DeleteSandbox(ctx, &agentv1.DeleteSandboxRequest{
		Name: ref.ID, AllowMissing: true, Grace: durationpb.New(0),
	})
	return domainError(err)
}

// Dial implements sandbox.Driver: the API carries no guest channel.
func (d *Driver) Dial(context.Context, sandbox.Ref, uint32) (net.Conn, error) {
	return nil, fmt.Errorf("dial: %w", sandbox.ErrUnsupported)
}

// Logs implements sandbox.LogSource.
func (d *Driver) Logs(
	ctx context.Context, ref sandbox.Ref, opts sandbox.LogOptions, yield func(sandbox.LogEntry) error,
) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req := &agentv1.StreamSandboxLogsRequest{Name: ref.ID, Follow: opts.Follow}
	if opts.Tail >= 0 {
		tail := uint32(opts.Tail)
		req.Tail = &tail
	}
	if !opts.Since.IsZero() {
		req.Since = timestamppb.New(opts.Since)
	}
	if opts.Stdout {
		req.Streams = append(req.Streams, agentv1.LogStream_LOG_STREAM_STDOUT)
	}
	if opts.Stderr {
		req.Streams = append(req.Streams, agentv1.LogStream_LOG_STREAM_STDERR)
	}
	stream, err := d.sandboxes.StreamSandboxLogs(ctx, req)
	if err != nil {
		return domainError(err)
	}
	for {
		entry, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return domainError(err)
		}
		if err := yield(sandbox.LogEntry{
			Time: entry.GetTime().AsTime(), Stderr: entry.GetStream() == agentv1.LogStream_LOG_STREAM_STDERR,
			Data: entry.GetData(),
		}); err != nil {
			return err
		}
	}
}

// observation guesses what the driver said from what the API tells.
func observation(w *agentv1.Sandbox) sandbox.Observation {
	s := w.GetStatus()
	obs := sandbox.Observation{Detail: s.GetMessage(), Paused: s.GetPhase() == agentv1.Phase_PHASE_PAUSED}
	if s.GetStartTime() != nil {
		obs.StartedAt = s.GetStartTime().AsTime()
	}
	switch s.GetPhase() {
	case agentv1.Phase_PHASE_STARTING, agentv1.Phase_PHASE_READY, agentv1.Phase_PHASE_PAUSED, agentv1.Phase_PHASE_STOPPING,
		agentv1.Phase_PHASE_DELETING, agentv1.Phase_PHASE_UNSPECIFIED:
		if s.GetStartTime() != nil { // or else the driver was not asked yet
			obs.State = sandbox.StateRunning
			return obs
		}
	}
	exit := s.GetExit()
	if exit == nil {
		obs.State = sandbox.StateCreated
		return obs
	}
	obs.State = sandbox.StateExited
	obs.ExitCode = int(exit.GetCode())
	obs.OOMKilled = exit.GetOomKilled()
	obs.FinishedAt = exit.GetTime().AsTime()
	return obs
}

// domainError turns a status back into the error it was made of, as far as it
// tells.
func domainError(err error) error {
	s, ok := status.FromError(err)
	if !ok || s.Code() == codes.OK {
		return err
	}
	switch s.Code() {
	case codes.Canceled:
		return fmt.Errorf("%s: %w", s.Message(), context.Canceled)
	case codes.DeadlineExceeded:
		if len(s.Details()) == 0 || reasonOf(s) == "DEADLINE_EXCEEDED" {
			return fmt.Errorf("%s: %w", s.Message(), context.DeadlineExceeded)
		}
	}
	sentinel := errors.New(s.Code().String())
	table := sandbox.Failures()
	if i := slices.IndexFunc(table, func(f sandbox.Failure) bool { return f.Reason == reasonOf(s) }); i >= 0 && table[i].Sentinel != nil {
		sentinel = table[i].Sentinel
	}
	for _, detail := range s.Details() {
		if bad, ok := detail.(*errdetails.BadRequest); ok && len(bad.GetFieldViolations()) > 0 {
			violation := bad.GetFieldViolations()[0]
			return &sandbox.FieldError{Field: violation.GetField(), Problem: violation.GetDescription(), Err: sentinel}
		}
	}
	return fmt.Errorf("%s: %w", s.Message(), sentinel)
}

func reasonOf(s *status.Status) string {
	for _, detail := range s.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

// specToWire says in the API's terms what the suite's specs hold. It is not
// the server's conversion, which it is to test.
func specToWire(s sandbox.Spec) (*agentv1.SandboxSpec, error) {
	w := &agentv1.SandboxSpec{
		Driver: s.Driver, MachineClass: s.MachineClass, Entrypoint: s.Entrypoint, Command: s.Command,
		User: s.User, WorkingDir: s.WorkingDir, Env: s.Env,
		Resources: &agentv1.Resources{
			CpuMillis: s.Resources.CPUMillis, MemoryMib: s.Resources.MemoryMiB, Pids: s.Resources.Pids,
		},
	}
	if s.Readiness.Timeout != 0 {
		w.Readiness = &agentv1.Readiness{Timeout: durationpb.New(s.Readiness.Timeout)}
	}
	switch {
	case s.Image != "":
		w.Source = &agentv1.SandboxSpec_Image{Image: s.Image}
	case s.Machine != "":
		w.Source = &agentv1.SandboxSpec_Machine{Machine: s.Machine}
	}
	for _, m := range s.Mounts {
		kind := map[sandbox.MountKind]agentv1.Mount_Kind{
			sandbox.MountWorkspace: agentv1.Mount_KIND_WORKSPACE, sandbox.MountData: agentv1.Mount_KIND_DATA,
		}[m.Kind]
		w.Mounts = append(w.Mounts, &agentv1.Mount{
			Kind: kind, Source: m.Source, Target: m.Target, ReadWrite: m.ReadWrite,
		})
	}
	if s.DriverOptions != nil {
		var options map[string]any
		if err := json.Unmarshal(s.DriverOptions, &options); err != nil {
			return nil, sandbox.Invalidf("spec.driver_options", "%v", err)
		}
		var err error
		if w.DriverOptions, err = structpb.NewStruct(options); err != nil {
			return nil, err
		}
	}
	return w, nil
}
