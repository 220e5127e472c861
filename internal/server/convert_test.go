package server

import (
	"encoding/json"
	"errors"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

// fullSpec sets every field of a spec to something else than its zero value.
func fullSpec(t testing.TB) *agentv1.SandboxSpec {
	t.Helper()
	options, err := structpb.NewStruct(map[string]any{
		"a": 1.5, "b": []any{"x", nil, true}, "c": map[string]any{"d": "e"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return &agentv1.SandboxSpec{
		Driver:       "podman",
		Source:       &agentv1.SandboxSpec_Image{Image: "docker.io/library/busybox:latest"},
		MachineClass: "small",
		Entrypoint:   []string{"/bin/sh", "-c"},
		Command:      []string{"sleep", ""},
		User:         "1000:1000",
		WorkingDir:   "/workspace",
		Env:          map[string]string{"A": "b", "EMPTY": ""},
		Resources:    &agentv1.Resources{CpuMillis: 1500, MemoryMib: 512, Pids: 100},
		Mounts: []*agentv1.Mount{
			{Kind: agentv1.Mount_KIND_WORKSPACE, Source: "/src", Target: "/workspace", ReadWrite: true},
			{Kind: agentv1.Mount_KIND_DATA, Source: "/var/data", Target: "/data"},
			{Kind: agentv1.Mount_KIND_DISK, Source: "/var/disk.img", Target: "/disk", SizeMib: 1 << 24},
		},
		Ports: []*agentv1.Port{
			{Name: "http", GuestPort: 80, HostPort: 8080, Protocol: agentv1.Protocol_PROTOCOL_TCP, BindAddress: "::1"},
			{GuestPort: 65535, Protocol: agentv1.Protocol_PROTOCOL_UDP},
		},
		Secrets: []*agentv1.SecretRef{{Name: "KEY", Source: "file:/key", File: true, Optional: true}},
		Readiness: &agentv1.Readiness{
			Probe:   &agentv1.Readiness_Http{Http: &agentv1.HttpProbe{Port: 80, Path: "/health"}},
			Timeout: durationpb.New(time.Minute), Interval: durationpb.New(time.Second),
		},
		Idle: &agentv1.IdlePolicy{Timeout: durationpb.New(time.Hour), Action: agentv1.IdlePolicy_ACTION_STOP},
		Restart: &agentv1.RestartPolicy{
			Mode: agentv1.RestartPolicy_MODE_ON_FAILURE, MaxRetries: 5,
			InitialBackoff: durationpb.New(time.Second), MaxBackoff: durationpb.New(time.Minute),
		},
		DriverOptions:  options,
		Keyless:        true,
		SecretRotation: &agentv1.SecretRotation{Action: agentv1.SecretRotation_ACTION_SIGNAL, Signal: "USR1"},
		AutoForward:    &agentv1.AutoForward{Mode: agentv1.AutoForward_MODE_FORWARD, DenyPorts: []uint32{22, 5432}},
		Egress: &agentv1.Egress{
			Mode: agentv1.Egress_MODE_LIST, DenyPrivate: true, Rules: []*agentv1.EgressRule{
				{Name: "*.example.com", Ports: []*agentv1.PortRange{{From: 443}, {From: 1, To: 65535}}, Protocol: agentv1.EgressRule_PROTOCOL_TCP},
				{Cidr: "192.0.2.0/24", Protocol: agentv1.EgressRule_PROTOCOL_UDP},
				{Cidr: "0.0.0.0/0", Protocol: agentv1.EgressRule_PROTOCOL_ANY},
				{Name: "example.com"},
			},
		},
	}
}

func TestSpecSurvivesBothConversions(t *testing.T) {
	t.Parallel()
	full := fullSpec(t)
	fields := full.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		if field := fields.Get(i); field.ContainingOneof() == nil && !full.ProtoReflect().Has(field) {
			t.Errorf("field %s is not part of this test", field.Name())
		}
	}
	machine := proto.CloneOf(full)
	machine.Source = &agentv1.SandboxSpec_Machine{Machine: "nixos"}
	machine.Readiness.Probe = &agentv1.Readiness_Tcp{Tcp: &agentv1.TcpProbe{Port: 22}}
	machine.Idle.Action = agentv1.IdlePolicy_ACTION_HIBERNATE
	machine.Restart.Mode = agentv1.RestartPolicy_MODE_ALWAYS
	machine.SecretRotation = &agentv1.SecretRotation{Action: agentv1.SecretRotation_ACTION_RESTART}
	machine.AutoForward.Mode = agentv1.AutoForward_MODE_OFF
	machine.Egress = &agentv1.Egress{Mode: agentv1.Egress_MODE_DENY}
	exec := proto.CloneOf(full)
	exec.SecretRotation = &agentv1.SecretRotation{Action: agentv1.SecretRotation_ACTION_LEAVE}
	exec.AutoForward = &agentv1.AutoForward{Mode: agentv1.AutoForward_MODE_OFFER}
	exec.Readiness.Probe = &agentv1.Readiness_Exec{Exec: &agentv1.ExecProbe{Command: []string{"true"}}}
	exec.Restart.Mode = agentv1.RestartPolicy_MODE_NEVER
	exec.Egress = &agentv1.Egress{Mode: agentv1.Egress_MODE_ALLOW, DenyPrivate: true}
	bare := &agentv1.SandboxSpec{Source: &agentv1.SandboxSpec_Image{Image: "x"}}
	for _, want := range []*agentv1.SandboxSpec{full, machine, exec, bare} {
		spec, err := specFromWire(want)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, specToWire(spec), protocmp.Transform()); diff != "" {
			t.Errorf("spec changed (-want +got):\n%s", diff)
		}
	}
}

func TestSpecFromWireNamesTheField(t *testing.T) {
	t.Parallel()
	const unknown = 99
	for _, test := range []struct {
		field  string
		change func(*agentv1.SandboxSpec)
	}{
		{"spec.mounts[1].kind", func(s *agentv1.SandboxSpec) { s.Mounts[1].Kind = unknown }},
		{"spec.ports[0].protocol", func(s *agentv1.SandboxSpec) { s.Ports[0].Protocol = unknown }},
		{"spec.ports[0].guest_port", func(s *agentv1.SandboxSpec) { s.Ports[0].GuestPort = 65536 }},
		{"spec.ports[1].guest_port", func(s *agentv1.SandboxSpec) { s.Ports[1].GuestPort = 0 }},
		{"spec.ports[1].host_port", func(s *agentv1.SandboxSpec) { s.Ports[1].HostPort = math.MaxUint32 }},
		{"spec.readiness.http.port", func(s *agentv1.SandboxSpec) { s.Readiness.GetHttp().Port = 1 << 16 }},
		{"spec.readiness.tcp.port", func(s *agentv1.SandboxSpec) {
			s.Readiness.Probe = &agentv1.Readiness_Tcp{Tcp: &agentv1.TcpProbe{}}
		}},
		{"spec.readiness.exec.command", func(s *agentv1.SandboxSpec) {
			s.Readiness.Probe = &agentv1.Readiness_Exec{Exec: &agentv1.ExecProbe{}}
		}},
		{"spec.readiness.timeout", func(s *agentv1.SandboxSpec) { s.Readiness.Timeout = durationpb.New(-1) }},
		{"spec.readiness.interval", func(s *agentv1.SandboxSpec) {
			s.Readiness.Interval = &durationpb.Duration{Seconds: 1, Nanos: -1}
		}},
		{"spec.idle.action", func(s *agentv1.SandboxSpec) { s.Idle.Action = unknown }},
		{"spec.idle.timeout", func(s *agentv1.SandboxSpec) {
			s.Idle.Timeout = &durationpb.Duration{Seconds: 300e9}
		}},
		{"spec.restart.mode", func(s *agentv1.SandboxSpec) { s.Restart.Mode = -1 }},
		{"spec.restart.initial_backoff", func(s *agentv1.SandboxSpec) {
			s.Restart.InitialBackoff = durationpb.New(-time.Second)
		}},
		{"spec.restart.max_backoff", func(s *agentv1.SandboxSpec) {
			s.Restart.MaxBackoff = &durationpb.Duration{Seconds: math.MaxInt64}
		}},
		{"spec.egress.mode", func(s *agentv1.SandboxSpec) { s.Egress.Mode = unknown }},
		{"spec.egress.rules[1].protocol", func(s *agentv1.SandboxSpec) { s.Egress.Rules[1].Protocol = unknown }},
		{"spec.egress.rules[0].ports[1].from", func(s *agentv1.SandboxSpec) { s.Egress.Rules[0].Ports[1].From = 0 }},
		{"spec.egress.rules[0].ports[0].to", func(s *agentv1.SandboxSpec) { s.Egress.Rules[0].Ports[0].To = 65536 }},
		{"spec.driver_options.a", func(s *agentv1.SandboxSpec) {
			s.DriverOptions.Fields["a"] = structpb.NewNumberValue(math.NaN())
		}},
		{"spec.driver_options.b[0]", func(s *agentv1.SandboxSpec) {
			s.DriverOptions.Fields["b"].GetListValue().Values[0] = &structpb.Value{}
		}},
		{"spec.driver_options.c.d", func(s *agentv1.SandboxSpec) {
			s.DriverOptions.Fields["c"].GetStructValue().Fields["d"] = structpb.NewNumberValue(math.Inf(1))
		}},
	} {
		t.Run(test.field, func(t *testing.T) {
			t.Parallel()
			w := fullSpec(t)
			test.change(w)
			_, err := specFromWire(w)
			field, ok := errors.AsType[*sandbox.FieldError](err)
			if !ok || field.Field != test.field {
				t.Errorf("error = %v, want one of field %s", err, test.field)
			}
		})
	}
	if _, err := specFromWire(nil); err == nil {
		t.Error("no spec at all was taken")
	}
}

func TestGrace(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		wire *durationpb.Duration
		want time.Duration
		bad  bool
	}{
		{wire: nil, want: 10 * time.Second},
		{wire: durationpb.New(0), want: 0},
		{wire: durationpb.New(10 * time.Minute), want: 10 * time.Minute},
		{wire: durationpb.New(10*time.Minute + 1), bad: true},
		{wire: durationpb.New(-1), bad: true},
	} {
		got, err := graceFromWire(test.wire)
		if (err != nil) != test.bad || err == nil && got != test.want {
			t.Errorf("grace of %v = %v, %v", test.wire, got, err)
		}
	}
}

func TestLogOptions(t *testing.T) {
	t.Parallel()
	zero, many := uint32(0), uint32(math.MaxUint32)
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	for _, test := range []struct {
		name string
		req  *agentv1.StreamSandboxLogsRequest
		want sandbox.LogOptions
		bad  string
	}{
		{"nothing", &agentv1.StreamSandboxLogsRequest{}, sandbox.LogOptions{Tail: -1, Stdout: true, Stderr: true}, ""},
		{
			"all", &agentv1.StreamSandboxLogsRequest{
				Follow: true, Tail: &zero, Since: timestamppb.New(at),
				Streams: []agentv1.LogStream{agentv1.LogStream_LOG_STREAM_STDERR},
			},
			sandbox.LogOptions{Follow: true, Since: at, Stderr: true},
			"",
		},
		{
			"long tail", &agentv1.StreamSandboxLogsRequest{Tail: &many},
			sandbox.LogOptions{Tail: math.MaxInt32, Stdout: true, Stderr: true},
			"",
		},
		{"bad since", &agentv1.StreamSandboxLogsRequest{Since: &timestamppb.Timestamp{Nanos: -1}}, sandbox.LogOptions{}, "since"},
		{
			"bad stream", &agentv1.StreamSandboxLogsRequest{Streams: []agentv1.LogStream{1, 0}},
			sandbox.LogOptions{},
			"streams[1]",
		},
	} {
		got, err := logOptionsFromWire(test.req)
		field, _ := errors.AsType[*sandbox.FieldError](err)
		switch {
		case test.bad != "" && (field == nil || field.Field != test.bad):
			t.Errorf("%s: error = %v, want one of field %s", test.name, err, test.bad)
		case test.bad == "" && err != nil:
			t.Errorf("%s: %v", test.name, err)
		case test.bad == "" && got != test.want:
			t.Errorf("%s: %+v, want %+v", test.name, got, test.want)
		}
	}
}

func TestEveryPhaseAndDesiredStateHasItsOwnNumber(t *testing.T) {
	t.Parallel()
	phases := []manager.Phase{
		manager.PhaseUnknown, manager.PhaseCreating, manager.PhaseStopped, manager.PhaseStarting, manager.PhaseReady,
		manager.PhaseBackoff, manager.PhaseStopping, manager.PhaseFailed, manager.PhaseDeleting,
		manager.PhasePaused,
	}
	var seen []agentv1.Phase
	for _, phase := range phases {
		w := phaseToWire(phase)
		if slices.Contains(seen, w) {
			t.Errorf("phase %s shares %s", phase, w)
		}
		seen = append(seen, w)
	}
	for desired, want := range map[manager.Desired]agentv1.DesiredState{
		manager.DesiredStopped: agentv1.DesiredState_DESIRED_STATE_STOPPED,
		manager.DesiredRunning: agentv1.DesiredState_DESIRED_STATE_RUNNING,
		manager.DesiredDeleted: agentv1.DesiredState_DESIRED_STATE_DELETED,
	} {
		if got := desiredToWire(desired); got != want {
			t.Errorf("%s is %s, want %s", desired, got, want)
		}
	}
}

func TestFingerprintTellsRequestsApart(t *testing.T) {
	t.Parallel()
	base := &agentv1.CreateSandboxRequest{
		Sandbox: &agentv1.Sandbox{Name: "a", Labels: map[string]string{"x": "1", "y": "2", "z": "3"}}, RequestId: "one",
	}
	retry := proto.CloneOf(base)
	retry.RequestId = "two"
	if fingerprint(base) != fingerprint(retry) {
		t.Error("the request id is part of the fingerprint")
	}
	other := proto.CloneOf(base)
	other.Start = true
	for _, req := range []proto.Message{
		other,
		&agentv1.StartSandboxRequest{Name: "a"}, &agentv1.TouchSandboxRequest{Name: "a"},
		&agentv1.StopSandboxRequest{Name: "a"}, &agentv1.StopSandboxRequest{Name: "a", Grace: durationpb.New(0)},
	} {
		for _, another := range []proto.Message{base, &agentv1.DeleteSandboxRequest{Name: "a"}} {
			if fingerprint(req) == fingerprint(another) {
				t.Errorf("%v and %v have one fingerprint", req, another)
			}
		}
	}
}

func TestFieldsOfTheFutureAreRefused(t *testing.T) {
	t.Parallel()
	future := protowire.AppendVarint(protowire.AppendTag(nil, 777, protowire.VarintType), 1)
	for path, change := range map[string]func(*agentv1.CreateSandboxRequest){
		"request":        func(r *agentv1.CreateSandboxRequest) { r.ProtoReflect().SetUnknown(future) },
		"sandbox":        func(r *agentv1.CreateSandboxRequest) { r.Sandbox.ProtoReflect().SetUnknown(future) },
		"spec":           func(r *agentv1.CreateSandboxRequest) { r.Sandbox.Spec.ProtoReflect().SetUnknown(future) },
		"spec.mounts[1]": func(r *agentv1.CreateSandboxRequest) { r.Sandbox.Spec.Mounts[1].ProtoReflect().SetUnknown(future) },
		"spec.readiness.http": func(r *agentv1.CreateSandboxRequest) {
			r.Sandbox.Spec.Readiness.GetHttp().ProtoReflect().SetUnknown(future)
		},
	} {
		req := &agentv1.CreateSandboxRequest{Sandbox: &agentv1.Sandbox{Name: "a", Spec: fullSpec(t)}}
		if err := refuseUnknown(req.ProtoReflect(), ""); err != nil {
			t.Fatal(err)
		}
		change(req)
		err := refuseUnknown(req.ProtoReflect(), "")
		field, ok := errors.AsType[*sandbox.FieldError](err)
		if !ok || field.Field != path || !errors.Is(err, sandbox.ErrUnsupported) {
			t.Errorf("error = %v, want one of field %s", err, path)
		}
	}
}

func TestPageTokensAreTiedToTheirSelector(t *testing.T) {
	t.Parallel()
	token := pageToken("web-1", "a=b")
	if after, err := parsePageToken(token, "a=b"); err != nil || after != "web-1" {
		t.Errorf("after = %q, %v", after, err)
	}
	for _, bad := range [][2]string{{token, "a=c"}, {"!", ""}, {"AAAA", ""}, {pageToken("../x", ""), ""}, {pageToken("", ""), ""}} {
		if _, err := parsePageToken(bad[0], bad[1]); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("token %q with selector %q: %v", bad[0], bad[1], err)
		}
	}
}

// FuzzSpec checks that whatever arrives is either refused or said again
// unchanged, and that what is refused names its field.
func FuzzSpec(f *testing.F) {
	seed, err := proto.Marshal(fullSpec(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		var w agentv1.SandboxSpec
		if proto.Unmarshal(data, &w) != nil {
			return
		}
		_ = refuseUnknown(w.ProtoReflect(), "spec")
		spec, err := specFromWire(&w)
		if err != nil {
			if field, ok := errors.AsType[*sandbox.FieldError](err); !ok || field.Field == "" {
				t.Fatalf("error without a field: %v", err)
			}
			return
		}
		again, err := specFromWire(specToWire(spec))
		if err != nil {
			t.Fatalf("said again, it is refused: %v", err)
		}
		if diff := cmp.Diff(spec, again, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("said again, it differs:\n%s", diff)
		}
		if _, err := json.Marshal(spec); err != nil {
			t.Fatalf("it cannot be recorded: %v", err)
		}
		_ = spec.Validate()
	})
}

// FuzzCreate does the same for all that a caller may send with it, through
// fingerprint and status.
func FuzzCreate(f *testing.F) {
	seed, err := proto.Marshal(&agentv1.CreateSandboxRequest{
		Sandbox: &agentv1.Sandbox{Name: "a", Spec: fullSpec(f)}, RequestId: "id",
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed, "token")
	f.Fuzz(func(t *testing.T, data []byte, token string) {
		_, _ = parsePageToken(token, "")
		var req agentv1.CreateSandboxRequest
		if proto.Unmarshal(data, &req) != nil {
			return
		}
		fingerprint(&req)
		err := errors.Join(refuseUnknown(req.ProtoReflect(), ""), checkRequestID(req.GetRequestId()))
		if _, converting := createFromWire(req.GetSandbox()); converting != nil {
			err = errors.Join(err, converting)
		}
		if err == nil {
			return
		}
		final := statusError(t.Context(), err, req.GetSandbox().GetName())
		if s := status.Convert(final); len(s.Details()) < 2 || s.Message() == "" {
			t.Fatalf("status of %v says too little: %v", err, s.Proto())
		}
	})
}
