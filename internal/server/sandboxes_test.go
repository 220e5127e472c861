package server_test

import (
	"encoding/json"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/structpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

func storeRequest() manager.Request { return manager.Request{} }

// wire says a spec of the process driver's in the API's terms.
func wire(t *testing.T, spec sandbox.Spec) *agentv1.SandboxSpec {
	t.Helper()
	w := &agentv1.SandboxSpec{
		Driver: spec.Driver, Source: &agentv1.SandboxSpec_Image{Image: spec.Image}, Command: spec.Command,
	}
	if spec.DriverOptions != nil {
		w.DriverOptions = &structpb.Struct{}
		if err := w.DriverOptions.UnmarshalJSON(spec.DriverOptions); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// slowSpec takes that long to start.
func slowSpec(t *testing.T, delay string) sandbox.Spec {
	t.Helper()
	spec := process.Spec("sleep")
	var err error
	if spec.DriverOptions, err = json.Marshal(process.Options{StartDelay: delay}); err != nil {
		t.Fatal(err)
	}
	return spec
}

func mustCreate(t *testing.T, c clients, name string, spec sandbox.Spec, start bool) *agentv1.Sandbox {
	t.Helper()
	answer, err := c.sandboxes.CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{
		Sandbox: &agentv1.Sandbox{Name: name, Spec: wire(t, spec), Labels: map[string]string{"name": name, "all": ""}},
		Start:   start,
	})
	if err != nil {
		t.Fatal(err)
	}
	return answer.GetSandbox()
}

func TestLifeThroughTheAPI(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: processes(t)})
	c := dial(t, agent)
	ctx := t.Context()
	phase := func(sb *agentv1.Sandbox, err error, want agentv1.Phase) *agentv1.Sandbox {
		t.Helper()
		if err != nil || sb.GetStatus().GetPhase() != want {
			t.Fatalf("%v, %v; want %s", sb, err, want)
		}
		return sb
	}
	made, err := c.sandboxes.EnsureSandbox(ctx, &agentv1.EnsureSandboxRequest{
		Name: "a", Sandbox: &agentv1.Sandbox{Spec: wire(t, process.Spec("sleep"))},
	})
	first := phase(made.GetSandbox(), err, agentv1.Phase_PHASE_READY)
	if first.GetName() != "a" || first.GetUid() == "" || first.GetVersion() == "" || first.GetStatus().GetGeneration() != 1 ||
		first.GetCreateTime() == nil || first.GetStatus().GetReadyTime() == nil || first.GetSpec().GetDriver() != process.Name {
		t.Errorf("sandbox = %v", first)
	}
	got, err := c.sandboxes.GetSandbox(ctx, &agentv1.GetSandboxRequest{Name: "a"})
	phase(got.GetSandbox(), err, agentv1.Phase_PHASE_READY)
	restarted, err := c.sandboxes.RestartSandbox(ctx, &agentv1.RestartSandboxRequest{Name: "a"})
	if sb := phase(restarted.GetSandbox(), err, agentv1.Phase_PHASE_READY); sb.GetStatus().GetGeneration() != 2 {
		t.Errorf("after a restart: %v", sb)
	}
	stopped, err := c.sandboxes.StopSandbox(ctx, &agentv1.StopSandboxRequest{Name: "a"})
	if sb := phase(stopped.GetSandbox(), err, agentv1.Phase_PHASE_STOPPED); sb.GetStatus().GetExit() == nil ||
		sb.GetDesiredState() != agentv1.DesiredState_DESIRED_STATE_STOPPED {
		t.Errorf("stopped: %v", sb)
	}
	started, err := c.sandboxes.StartSandbox(ctx, &agentv1.StartSandboxRequest{Name: "a"})
	phase(started.GetSandbox(), err, agentv1.Phase_PHASE_READY)
	touched, err := c.sandboxes.TouchSandbox(ctx, &agentv1.TouchSandboxRequest{Name: "a"})
	if err != nil || time.Since(touched.GetLastActivityTime().AsTime()) > time.Minute {
		t.Errorf("touched: %v, %v", touched, err)
	}
	if _, err := c.sandboxes.DeleteSandbox(ctx, &agentv1.DeleteSandboxRequest{Name: "a"}); err != nil {
		t.Error(err)
	}
	_, err = c.sandboxes.GetSandbox(ctx, &agentv1.GetSandboxRequest{Name: "a"})
	s := wantError(t, err, codes.NotFound, "NOT_FOUND", "")
	if info, ok := s.Details()[0].(*errdetails.ErrorInfo); !ok || info.GetMetadata()["sandbox"] != "a" {
		t.Errorf("details = %v", s.Details())
	}
	if _, err := c.sandboxes.DeleteSandbox(ctx, &agentv1.DeleteSandboxRequest{Name: "a", AllowMissing: true}); err != nil {
		t.Error(err)
	}
}

func TestBadRequestsNameTheField(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: processes(t)})
	c := dial(t, agent)
	mustCreate(t, c, "a", process.Spec("sleep"), false)
	box := func(change func(*agentv1.Sandbox)) *agentv1.Sandbox {
		sb := &agentv1.Sandbox{Name: "b", Spec: wire(t, process.Spec("sleep"))}
		change(sb)
		return sb
	}
	create := func(change func(*agentv1.Sandbox)) func() error {
		return func() error {
			_, err := c.sandboxes.CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{Sandbox: box(change)})
			return err
		}
	}
	update := func(paths ...string) func() error {
		return func() error {
			_, err := c.sandboxes.UpdateSandbox(t.Context(), &agentv1.UpdateSandboxRequest{
				Sandbox: box(func(sb *agentv1.Sandbox) {
					sb.Name = "a"
					sb.Spec.Idle = &agentv1.IdlePolicy{Action: 77}
				}),
				UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
			})
			return err
		}
	}
	for _, test := range []struct {
		name  string
		call  func() error
		field string
	}{
		{"no sandbox", func() error {
			_, err := c.sandboxes.CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{})
			return err
		}, "sandbox"},
		{"no spec", create(func(sb *agentv1.Sandbox) { sb.Spec = nil }), "spec"},
		{"no name", create(func(sb *agentv1.Sandbox) { sb.Name = "" }), "name"},
		{"bad name", create(func(sb *agentv1.Sandbox) { sb.Name = "../a" }), "name"},
		{"port", create(func(sb *agentv1.Sandbox) { sb.Spec.Ports = []*agentv1.Port{{GuestPort: 70000}} }), "spec.ports[0].guest_port"},
		{"long label", create(func(sb *agentv1.Sandbox) {
			sb.Labels = map[string]string{"k": strings.Repeat("x", 257)}
		}), "labels[k]"},
		{"driver", create(func(sb *agentv1.Sandbox) { sb.Spec.Driver = "none" }), "spec.driver"},
		{"no image", create(func(sb *agentv1.Sandbox) { sb.Spec.Source = nil }), "spec.image"},
		{"get", func() error {
			_, err := c.sandboxes.GetSandbox(t.Context(), &agentv1.GetSandboxRequest{})
			return err
		}, "name"},
		{"ensure", func() error {
			_, err := c.sandboxes.EnsureSandbox(t.Context(), &agentv1.EnsureSandboxRequest{
				Name: "x", Sandbox: box(func(*agentv1.Sandbox) {}),
			})
			return err
		}, "sandbox.name"},
		{"grace", func() error {
			_, err := c.sandboxes.StopSandbox(t.Context(), &agentv1.StopSandboxRequest{Name: "a", Grace: durationpb.New(time.Hour)})
			return err
		}, "grace"},
		{"request id", func() error {
			_, err := c.sandboxes.StartSandbox(t.Context(), &agentv1.StartSandboxRequest{Name: "a", RequestId: strings.Repeat("é", 129)})
			return err
		}, "request_id"},
		{"page size", func() error {
			_, err := c.sandboxes.ListSandboxes(t.Context(), &agentv1.ListSandboxesRequest{PageSize: math.MinInt32})
			return err
		}, "page_size"},
		{"page token", func() error {
			_, err := c.sandboxes.ListSandboxes(t.Context(), &agentv1.ListSandboxesRequest{PageToken: "x"})
			return err
		}, "page_token"},
		{"selector", func() error {
			_, err := c.sandboxes.ListSandboxes(t.Context(), &agentv1.ListSandboxesRequest{LabelSelector: "=,"})
			return err
		}, "label_selector"},
		{"no mask", update(), "update_mask"},
		{"star", update("*"), "update_mask"},
		{"immutable", update("labels", "spec.command"), "update_mask"},
		{"below idle", update("spec.idle.timeout"), "update_mask"},
		{"idle", update("spec.idle"), "spec.idle.action"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := test.call()
			code, reason := codes.InvalidArgument, "INVALID"
			if test.name == "idle" {
				code, reason = codes.Unimplemented, "UNSUPPORTED"
			}
			wantError(t, err, code, reason, test.field)
		})
	}
	list, err := c.sandboxes.ListSandboxes(t.Context(), &agentv1.ListSandboxesRequest{})
	if err != nil || len(list.GetSandboxes()) != 1 {
		t.Errorf("something was made: %v, %v", list, err)
	}
}

func TestWatchRefusesBadVersions(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: processes(t)})
	c := dial(t, agent)
	for field, req := range map[string]*agentv1.WatchSandboxesRequest{
		"resume_version": {ResumeVersion: "x"},
		"name":           {Name: "X"},
		"label_selector": {LabelSelector: ",,"},
	} {
		stream, err := c.sandboxes.WatchSandboxes(t.Context(), req)
		if err == nil {
			_, err = stream.Recv()
		}
		wantError(t, err, codes.InvalidArgument, "INVALID", field)
	}
}

func TestRequestIDsAreRememberedAcrossARestart(t *testing.T) {
	t.Parallel()
	drivers, dir := processes(t), filepath.Join(t.TempDir(), "state")
	req := &agentv1.CreateSandboxRequest{
		Sandbox:   &agentv1.Sandbox{Name: "a", Spec: wire(t, process.Spec("sleep"))},
		Start:     true,
		RequestId: "5a6e6a1c-3a1b-4d4e-9f6e-000000000001",
	}
	var first *agentv1.CreateSandboxResponse
	t.Run("before", func(t *testing.T) {
		c := dial(t, startAgent(t, agentOptions{Drivers: drivers, Dir: dir}))
		var err error
		if first, err = c.sandboxes.CreateSandbox(t.Context(), req); err != nil {
			t.Fatal(err)
		}
		again, err := c.sandboxes.CreateSandbox(t.Context(), req)
		if diff := cmp.Diff(first, again, protocmp.Transform()); err != nil || diff != "" {
			t.Errorf("retry: %v\n%s", err, diff)
		}
	})
	c := dial(t, startAgent(t, agentOptions{Drivers: drivers, Dir: dir}))
	again, err := c.sandboxes.CreateSandbox(t.Context(), req)
	if diff := cmp.Diff(first, again, protocmp.Transform()); err != nil || diff != "" {
		t.Errorf("retry after a restart: %v\n%s", err, diff)
	}
	other := proto.CloneOf(req)
	other.Start = false
	_, err = c.sandboxes.CreateSandbox(t.Context(), other)
	wantError(t, err, codes.InvalidArgument, "REQUEST_ID_REUSED", "request_id")
	_, err = c.host.Undrain(t.Context(), &agentv1.UndrainRequest{RequestId: req.GetRequestId()})
	wantError(t, err, codes.InvalidArgument, "REQUEST_ID_REUSED", "request_id")
	// Looking only uses no id up.
	other.ValidateOnly, other.RequestId = true, "another"
	other.Sandbox.Name = "b"
	if _, err := c.sandboxes.CreateSandbox(t.Context(), other); err != nil {
		t.Error(err)
	}
	other.ValidateOnly = false
	if _, err := c.sandboxes.CreateSandbox(t.Context(), other); err != nil {
		t.Error(err)
	}
}

func TestLogsOverTheAPI(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: processes(t)})
	c := dial(t, agent)
	_, err := c.sandboxes.CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{
		Sandbox: &agentv1.Sandbox{Name: "a", Spec: &agentv1.SandboxSpec{
			Source:  &agentv1.SandboxSpec_Image{Image: "/bin/sh"},
			Command: []string{"-c", "echo out; echo err >&2; printf part"},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	// It may end before it counts as ready, or after.
	_, _ = c.sandboxes.StartSandbox(t.Context(), &agentv1.StartSandboxRequest{Name: "a"})
	read := func(req *agentv1.StreamSandboxLogsRequest) map[agentv1.LogStream]string {
		t.Helper()
		req.Name = "a"
		stream, err := c.sandboxes.StreamSandboxLogs(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		text := map[agentv1.LogStream]string{}
		for _, entry := range recvAll(t, stream.Recv) {
			text[entry.GetStream()] += string(entry.GetData())
			if entry.GetTime() == nil {
				t.Errorf("entry without a time: %v", entry)
			}
		}
		return text
	}
	const out, stderr = agentv1.LogStream_LOG_STREAM_STDOUT, agentv1.LogStream_LOG_STREAM_STDERR
	want := map[agentv1.LogStream]string{out: "out\npart", stderr: "err\n"}
	if got := read(&agentv1.StreamSandboxLogsRequest{Follow: true}); !maps.Equal(got, want) {
		t.Errorf("followed: %q", got)
	}
	if got := read(&agentv1.StreamSandboxLogsRequest{Streams: []agentv1.LogStream{stderr}}); got[out] != "" || got[stderr] != "err\n" {
		t.Errorf("stderr only: %q", got)
	}
	_, err = c.sandboxes.StreamSandboxLogs(t.Context(), &agentv1.StreamSandboxLogsRequest{Name: "none"})
	if err == nil {
		stream, _ := c.sandboxes.StreamSandboxLogs(t.Context(), &agentv1.StreamSandboxLogsRequest{Name: "none"})
		_, err = stream.Recv()
	}
	wantError(t, err, codes.NotFound, "NOT_FOUND", "")
}

func TestUpdateChangesWhatTheMaskNames(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: processes(t)})
	c := dial(t, agent)
	mustCreate(t, c, "a", process.Spec("sleep"), false)
	wanted := &agentv1.Sandbox{
		Name: "a", Labels: map[string]string{"new": "1"},
		Spec: &agentv1.SandboxSpec{Idle: &agentv1.IdlePolicy{Timeout: durationpb.New(time.Hour)}},
	}
	for _, test := range []struct {
		paths  []string
		labels map[string]string
		idle   time.Duration
	}{
		{[]string{"spec.idle"}, map[string]string{"name": "a", "all": ""}, time.Hour},
		{[]string{"labels"}, map[string]string{"new": "1"}, time.Hour},
	} {
		answer, err := c.sandboxes.UpdateSandbox(t.Context(), &agentv1.UpdateSandboxRequest{
			Sandbox: wanted, UpdateMask: &fieldmaskpb.FieldMask{Paths: test.paths},
		})
		if err != nil {
			t.Fatal(err)
		}
		sb := answer.GetSandbox()
		if !maps.Equal(sb.GetLabels(), test.labels) || sb.GetSpec().GetIdle().GetTimeout().AsDuration() != test.idle {
			t.Errorf("after %v: %v", test.paths, sb)
		}
	}
	// A named field that is not set is cleared.
	answer, err := c.sandboxes.UpdateSandbox(t.Context(), &agentv1.UpdateSandboxRequest{
		Sandbox:    &agentv1.Sandbox{Name: "a"},
		UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"labels", "spec.idle"}},
	})
	if err != nil || len(answer.GetSandbox().GetLabels()) != 0 || answer.GetSandbox().GetSpec().GetIdle() != nil {
		t.Errorf("cleared: %v, %v", answer, err)
	}
}

func TestHostOverTheAPI(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{
		Drivers: processes(t),
		Manager: manager.Config{
			MaxRunning: 5,
			Classes: map[string]manager.Class{
				"small": {Resources: sandbox.Resources{CPUMillis: 500}}, "big": {Driver: process.Name},
			},
		},
	})
	c := dial(t, agent)
	mustCreate(t, c, "a", process.Spec("sleep"), true)
	info, err := c.host.GetInfo(t.Context(), &agentv1.GetInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if info.GetDefaultDriver() != process.Name || info.GetMaxRunning() != 5 || info.GetCpus() == 0 || info.GetMemoryMib() == 0 ||
		len(info.GetMachineClasses()) != 2 || info.GetMachineClasses()[0].GetName() != "big" || info.GetStartTime() == nil {
		t.Errorf("info = %v", info)
	}
	if d := info.GetDrivers()[0]; d.GetName() != process.Name || !d.GetAvailable() || !slices.Contains(d.GetAbilities(), "logs") {
		t.Errorf("driver = %v", d)
	}
	stats, err := c.host.GetStats(t.Context(), &agentv1.GetStatsRequest{})
	if err != nil || stats.GetMemoryTotalMib() == 0 || stats.GetAgentMemoryBytes() == 0 || len(stats.GetLoadAverage()) != 3 ||
		len(stats.GetSandboxes()) != 1 || stats.GetSandboxes()[0].GetPhase() != agentv1.Phase_PHASE_READY {
		t.Errorf("stats = %v, %v", stats, err)
	}
	drained, err := c.host.Drain(t.Context(), &agentv1.DrainRequest{StopSandboxes: true, RequestId: "d"})
	if err != nil || drained.GetStopped() != 1 {
		t.Errorf("drain = %v, %v", drained, err)
	}
	_, err = c.sandboxes.StartSandbox(t.Context(), &agentv1.StartSandboxRequest{Name: "a"})
	wantError(t, err, codes.Unavailable, "HOST_DRAINING", "")
	if _, err := c.host.Undrain(t.Context(), &agentv1.UndrainRequest{}); err != nil {
		t.Error(err)
	}
	if _, err := c.sandboxes.StartSandbox(t.Context(), &agentv1.StartSandboxRequest{Name: "a"}); err != nil {
		t.Error(err)
	}
}

func TestAdmissionSaysWhenToTryAgain(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{
		Drivers: processes(t),
		Manager: manager.Config{
			MinFreeMemoryMiB: 1000, Memory: func() (total, available uint64, err error) { return 2000, 10, nil },
		},
	})
	c := dial(t, agent)
	mustCreate(t, c, "a", process.Spec("sleep"), false)
	_, err := c.sandboxes.EnsureSandbox(t.Context(), &agentv1.EnsureSandboxRequest{Name: "a"})
	s := wantError(t, err, codes.ResourceExhausted, "RESOURCE_EXHAUSTED", "")
	if !slices.ContainsFunc(s.Details(), func(detail any) bool {
		retry, ok := detail.(*errdetails.RetryInfo)
		return ok && retry.GetRetryDelay().AsDuration() > 0
	}) {
		t.Errorf("no retry delay among %v", s.Details())
	}
}
