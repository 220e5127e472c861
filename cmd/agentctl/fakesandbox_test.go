package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

func asType[E error](err error) (E, bool) { return errors.AsType[E](err) }

// fakeSandbox is one sandbox: its command is a child process.
type fakeSandbox struct {
	agent *fakeAgent
	op    sync.Mutex // one operation at a time

	// Guarded by agent.mu.
	sb       *agentv1.Sandbox
	log      []*agentv1.StreamSandboxLogsResponse
	running  *exec.Cmd
	ended    chan struct{}
	logGrown chan struct{}

	execs     int // so far
	commands  map[string]*fakeExec
	forwards  []*agentv1.PortForward
	values    map[string]string // of inline secrets
	delivered map[string]string
}

// message returns a copy; agent.mu is held.
func (s *fakeSandbox) message() *agentv1.Sandbox { return proto.CloneOf(s.sb) }

// set changes the state and tells watchers.
func (s *fakeSandbox) set(change func(*agentv1.SandboxStatus)) *agentv1.Sandbox {
	s.agent.mu.Lock()
	defer s.agent.mu.Unlock()
	change(s.sb.GetStatus())
	sb := s.message()
	s.agent.record(&agentv1.WatchSandboxesResponse{Event: &agentv1.WatchSandboxesResponse_Changed{Changed: sb}})
	return sb
}

func (f *fakeAgent) get(name string) (*fakeSandbox, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s, ok := f.sandboxes[name]; ok {
		return s, nil
	}
	return nil, fail(fmt.Errorf("sandbox %s: %w", name, sandbox.ErrNotFound), name)
}

func (f *fakeAgent) GetSandbox(_ context.Context, req *agentv1.GetSandboxRequest) (*agentv1.GetSandboxResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return &agentv1.GetSandboxResponse{Sandbox: s.message()}, nil
}

func (f *fakeAgent) CreateSandbox(_ context.Context, req *agentv1.CreateSandboxRequest) (*agentv1.CreateSandboxResponse, error) {
	name := req.GetSandbox().GetName()
	if err := f.check(req.GetSandbox()); err != nil {
		return nil, fail(err, name)
	}
	sb := proto.CloneOf(req.GetSandbox())
	sb.Status = &agentv1.SandboxStatus{Exposures: exposures(sb.GetSpec().GetMounts())}
	if req.GetValidateOnly() {
		return &agentv1.CreateSandboxResponse{Sandbox: sb}, nil
	}
	now := timestamppb.Now()
	sb.Uid, sb.CreateTime, sb.UpdateTime = "uid-"+name, now, now
	sb.DesiredState = agentv1.DesiredState_DESIRED_STATE_STOPPED
	sb.Status.Phase, sb.Status.Resources = agentv1.Phase_PHASE_CREATING, sb.GetSpec().GetResources()
	sb.Spec.Driver = "fake"
	s := &fakeSandbox{agent: f, sb: sb, logGrown: make(chan struct{})}
	f.mu.Lock()
	if _, exists := f.sandboxes[name]; exists {
		f.mu.Unlock()
		return nil, fail(fmt.Errorf("create %s: %w", name, sandbox.ErrExists), name)
	}
	if err := s.keep(req.GetSecretValues()); err != nil {
		f.mu.Unlock()
		return nil, fail(err, name)
	}
	f.sandboxes[name] = s
	f.mu.Unlock()
	answer := s.set(func(*agentv1.SandboxStatus) {})
	if req.GetStart() {
		var err error
		if answer, err = s.boot(); err != nil {
			return nil, fail(err, name)
		}
	}
	return &agentv1.CreateSandboxResponse{Sandbox: answer}, nil
}

// exposures tells of the .env in each folder, and of what it says in there that
// there is more.
func exposures(mounts []*agentv1.Mount) []*agentv1.Exposure {
	var all []*agentv1.Exposure
	for _, m := range mounts {
		text, err := os.ReadFile(filepath.Join(m.GetSource(), ".env"))
		if err != nil {
			continue
		}
		x := &agentv1.Exposure{
			Source: m.GetSource(), Target: m.GetTarget(), TotalCount: 1, Incomplete: strings.Contains(string(text), "LARGE"),
			Files: []*agentv1.ExposedFile{{Path: ".env", Kind: agentv1.ExposedFile_KIND_ENVIRONMENT}},
		}
		if strings.Contains(string(text), "MORE") {
			x.Files = append(x.Files, &agentv1.ExposedFile{Path: "a\x1b[31m.key", Kind: agentv1.ExposedFile_KIND_KEY})
			x.TotalCount = 20
		}
		if strings.Contains(string(text), "NOTHING") {
			x.Files, x.TotalCount = nil, 0
		}
		all = append(all, x)
	}
	return all
}

func (f *fakeAgent) check(sb *agentv1.Sandbox) error {
	if err := sandbox.ValidateName("sandbox.name", sb.GetName()); err != nil {
		return err
	}
	if err := sandbox.ValidateLabels("sandbox.labels", sb.GetLabels()); err != nil {
		return err
	}
	spec := sb.GetSpec()
	if n := spec.GetResources().GetMemoryMib(); n > 0 && n < 8 {
		return sandbox.Invalidf("spec.resources.memory_mib", "%d is not from 8 to 67108864", n)
	}
	if spec.GetAutoForward().GetMode() == agentv1.AutoForward_MODE_FORWARD {
		return sandbox.Unsupportedf("spec.auto_forward.mode", "this agent forwards nothing by itself; leave it out")
	}
	for i, m := range spec.GetMounts() {
		if _, err := os.Stat(m.GetSource()); err != nil {
			return sandbox.Invalidf(fmt.Sprintf("spec.mounts[%d].source", i), "%q cannot be used: %v", m.GetSource(), errors.Unwrap(err))
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, image := range f.images {
		for _, name := range image.GetNames() {
			if name == spec.GetImage() {
				return nil
			}
		}
	}
	return &sandbox.FieldError{Field: "spec.image", Problem: fmt.Sprintf("%q is not among the driver's images", spec.GetImage()), Err: sandbox.ErrNotFound}
}

// boot starts the command and waits until it is ready.
func (s *fakeSandbox) boot() (*agentv1.Sandbox, error) {
	s.op.Lock()
	defer s.op.Unlock()
	f, name := s.agent, s.sb.GetName()
	f.mu.Lock()
	running, draining, spec := s.running != nil, f.draining, s.sb.GetSpec()
	s.sb.DesiredState = agentv1.DesiredState_DESIRED_STATE_RUNNING
	already := s.message()
	f.mu.Unlock()
	if already.GetStatus().GetPhase() == agentv1.Phase_PHASE_PAUSED {
		return s.resumed(), nil
	}
	if running {
		return already, nil
	}
	if draining {
		return nil, &sandbox.RetryError{Err: fmt.Errorf("start %s: %w", name, sandbox.ErrDraining), After: 30 * time.Second}
	}
	s.set(func(st *agentv1.SandboxStatus) {
		st.Phase, st.StartTime, st.Message = agentv1.Phase_PHASE_STARTING, timestamppb.Now(), ""
		st.Generation++
	})
	ended, err := s.launch(spec)
	if err != nil {
		return nil, err
	}
	if err := s.probe(spec, ended); err != nil {
		s.kill()
		s.set(func(st *agentv1.SandboxStatus) { st.Phase, st.Message = agentv1.Phase_PHASE_FAILED, err.Error() })
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return s.set(func(st *agentv1.SandboxStatus) {
		st.Phase, st.ReadyTime = agentv1.Phase_PHASE_READY, timestamppb.Now()
	}), nil
}

// probe waits until the readiness command succeeds, the child ends, or the
// time is up.
func (s *fakeSandbox) probe(spec *agentv1.SandboxSpec, ended chan struct{}) error {
	command := spec.GetReadiness().GetExec().GetCommand()
	timeout := time.Second
	if d := spec.GetReadiness().GetTimeout(); d != nil {
		timeout = d.AsDuration()
	}
	late := time.After(timeout)
	for len(command) > 0 {
		cmd := exec.Command(command[0], command[1:]...)
		cmd.Dir = workspaceOf(spec)
		if cmd.Run() == nil {
			return nil
		}
		select {
		case <-ended:
			return fmt.Errorf("exit status %d: %w", s.sb.GetStatus().GetExit().GetCode(), sandbox.ErrEnded)
		case <-late:
			return fmt.Errorf("not within %s: %w", timeout, sandbox.ErrNotReady)
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

func (s *fakeSandbox) launch(spec *agentv1.SandboxSpec) (chan struct{}, error) {
	command := append(append([]string{}, spec.GetEntrypoint()...), spec.GetCommand()...)
	if len(command) == 0 {
		command = []string{"sleep", "600"}
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	for name, value := range spec.GetEnv() {
		cmd.Env = append(cmd.Environ(), name+"="+value)
	}
	s.agent.mu.Lock()
	for _, ref := range spec.GetSecrets() {
		if value, ok := s.values[inlineName(ref)]; ok {
			cmd.Env = append(cmd.Environ(), ref.GetName()+"="+value)
		}
	}
	s.agent.mu.Unlock()
	cmd.Dir = workspaceOf(spec)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan struct{})
	s.agent.mu.Lock()
	s.running, s.ended = cmd, ended
	s.agent.mu.Unlock()
	var readers sync.WaitGroup
	readers.Go(func() { s.collect(agentv1.LogStream_LOG_STREAM_STDOUT, stdout) })
	readers.Go(func() { s.collect(agentv1.LogStream_LOG_STREAM_STDERR, stderr) })
	go func() {
		readers.Wait()
		_ = cmd.Wait()
		code := cmd.ProcessState.ExitCode()
		if code < 0 {
			code = 128 + int(cmd.ProcessState.Sys().(syscall.WaitStatus).Signal())
		}
		s.agent.mu.Lock()
		s.running = nil
		s.agent.mu.Unlock()
		s.set(func(st *agentv1.SandboxStatus) {
			st.Phase, st.Exit = agentv1.Phase_PHASE_STOPPED, &agentv1.Exit{Code: int32(code), Time: timestamppb.Now()}
			if code != 0 && code < 128 {
				st.Phase = agentv1.Phase_PHASE_FAILED
			}
		})
		close(ended)
	}()
	return ended, nil
}

func workspaceOf(spec *agentv1.SandboxSpec) string {
	for _, m := range spec.GetMounts() {
		if m.GetKind() == agentv1.Mount_KIND_WORKSPACE {
			return m.GetSource()
		}
	}
	return ""
}

func (s *fakeSandbox) collect(stream agentv1.LogStream, from io.Reader) {
	lines := bufio.NewReader(from)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			s.agent.mu.Lock()
			s.log = append(s.log, &agentv1.StreamSandboxLogsResponse{Stream: stream, Time: timestamppb.Now(), Data: line})
			close(s.logGrown)
			s.logGrown = make(chan struct{})
			s.agent.mu.Unlock()
		}
		if err != nil {
			return
		}
	}
}

// kill ends the child and waits for it.
func (s *fakeSandbox) kill() {
	s.agent.mu.Lock()
	cmd, ended := s.running, s.ended
	commands := s.commands
	s.commands = nil
	s.agent.mu.Unlock()
	for _, e := range commands {
		e.kill()
	}
	if cmd != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
	}
}

func (f *fakeAgent) StartSandbox(_ context.Context, req *agentv1.StartSandboxRequest) (*agentv1.StartSandboxResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	err = s.keep(req.GetSecretValues())
	f.mu.Unlock()
	if err != nil {
		return nil, fail(err, req.GetName())
	}
	sb, err := s.boot()
	if err != nil {
		return nil, fail(err, req.GetName())
	}
	return &agentv1.StartSandboxResponse{Sandbox: sb}, nil
}

func (f *fakeAgent) StopSandbox(_ context.Context, req *agentv1.StopSandboxRequest) (*agentv1.StopSandboxResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	s.kill()
	return &agentv1.StopSandboxResponse{Sandbox: s.set(func(st *agentv1.SandboxStatus) { st.Phase = agentv1.Phase_PHASE_STOPPED })}, nil
}

func (f *fakeAgent) RestartSandbox(_ context.Context, req *agentv1.RestartSandboxRequest) (*agentv1.RestartSandboxResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	s.kill()
	sb, err := s.boot()
	if err != nil {
		return nil, fail(err, req.GetName())
	}
	return &agentv1.RestartSandboxResponse{Sandbox: sb}, nil
}

func (f *fakeAgent) DeleteSandbox(_ context.Context, req *agentv1.DeleteSandboxRequest) (*agentv1.DeleteSandboxResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		if req.GetAllowMissing() {
			return &agentv1.DeleteSandboxResponse{}, nil
		}
		return nil, err
	}
	s.kill()
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.sandboxes, req.GetName())
	f.record(&agentv1.WatchSandboxesResponse{Event: &agentv1.WatchSandboxesResponse_Deleted{
		Deleted: &agentv1.Sandbox{Name: req.GetName(), Uid: s.sb.GetUid()},
	}})
	return &agentv1.DeleteSandboxResponse{}, nil
}

func (f *fakeAgent) UpdateSandbox(_ context.Context, req *agentv1.UpdateSandboxRequest) (*agentv1.UpdateSandboxResponse, error) {
	s, err := f.get(req.GetSandbox().GetName())
	if err != nil {
		return nil, err
	}
	for _, path := range req.GetUpdateMask().GetPaths() {
		switch path {
		case "labels":
			s.sb.Labels = maps.Clone(req.GetSandbox().GetLabels())
		case "spec.idle":
			s.sb.Spec.Idle = req.GetSandbox().GetSpec().GetIdle()
		case "spec.egress":
			s.sb.Spec.Egress = req.GetSandbox().GetSpec().GetEgress()
		default:
			return nil, fail(sandbox.Invalidf("update_mask", "%q cannot be changed", path), req.GetSandbox().GetName())
		}
	}
	return &agentv1.UpdateSandboxResponse{Sandbox: s.set(func(*agentv1.SandboxStatus) {})}, nil
}

func (f *fakeAgent) TouchSandbox(_ context.Context, req *agentv1.TouchSandboxRequest) (*agentv1.TouchSandboxResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	sb := s.set(func(st *agentv1.SandboxStatus) { st.LastActivityTime = timestamppb.Now() })
	return &agentv1.TouchSandboxResponse{LastActivityTime: sb.GetStatus().GetLastActivityTime()}, nil
}

func (f *fakeAgent) StreamSandboxLogs(req *agentv1.StreamSandboxLogsRequest, stream grpc.ServerStreamingServer[agentv1.StreamSandboxLogsResponse]) error {
	s, err := f.get(req.GetName())
	if err != nil {
		return err
	}
	wanted := func(e *agentv1.StreamSandboxLogsResponse) bool {
		return (len(req.GetStreams()) == 0 || strings.Contains(fmt.Sprint(req.GetStreams()), e.GetStream().String())) &&
			(req.GetSince() == nil || !e.GetTime().AsTime().Before(req.GetSince().AsTime()))
	}
	next := 0
	if req.Tail != nil {
		f.mu.Lock()
		next = max(0, len(s.log)-int(req.GetTail()))
		f.mu.Unlock()
	}
	for {
		f.mu.Lock()
		news, grown, running := s.log[next:], s.logGrown, s.running != nil
		ended := s.ended
		f.mu.Unlock()
		for _, e := range news {
			next++
			if wanted(e) {
				if err := stream.Send(e); err != nil {
					return err
				}
			}
		}
		if len(news) > 0 {
			continue
		}
		if !req.GetFollow() || !running {
			return nil
		}
		select {
		case <-grown:
		case <-ended:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}
