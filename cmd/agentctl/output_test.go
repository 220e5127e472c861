package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// noon is when the tests of pages and tables take place.
var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

func ago(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(noon.Add(-d)) }

// fullSandbox has everything that a sandbox can have.
func fullSandbox() *agentv1.Sandbox {
	options, _ := structpb.NewStruct(map[string]any{"userns": "keep-id", "caps": []any{"NET_BIND_SERVICE"}})
	return &agentv1.Sandbox{
		Name: "web", Uid: "6f2c", Labels: map[string]string{"tier": "web", "team": "apps"},
		DesiredState: agentv1.DesiredState_DESIRED_STATE_RUNNING,
		CreateTime:   ago(50 * time.Hour), UpdateTime: ago(90 * time.Minute),
		Spec: &agentv1.SandboxSpec{
			Driver: "podman", Source: &agentv1.SandboxSpec_Image{Image: "docker.io/library/node:22"}, MachineClass: "small",
			Entrypoint: []string{"/bin/tini", "--"}, Command: []string{"sh", "-c", "node 'my server.js'"}, User: "1000", WorkingDir: "/srv",
			Env: map[string]string{"B": "two words", "A": "1"},
			Mounts: []*agentv1.Mount{
				{Kind: agentv1.Mount_KIND_WORKSPACE, Source: "/home/ada/shop", Target: "/workspace"},
				{Kind: agentv1.Mount_KIND_DATA, Source: "/home/ada/data", Target: "/data"},
			},
			Ports:     []*agentv1.Port{{GuestPort: 8080}, {Name: "dns", GuestPort: 53, HostPort: 5353, Protocol: agentv1.Protocol_PROTOCOL_UDP, BindAddress: "0.0.0.0"}},
			Secrets:   []*agentv1.SecretRef{{Name: "KEY", Source: "env-file:/home/ada/keys"}},
			Readiness: &agentv1.Readiness{Probe: &agentv1.Readiness_Http{Http: &agentv1.HttpProbe{Port: 8080, Path: "/health"}}, Timeout: durationpb.New(30 * time.Second)},
			Idle:      &agentv1.IdlePolicy{Timeout: durationpb.New(30 * time.Minute), Action: agentv1.IdlePolicy_ACTION_HIBERNATE},
			Restart:   &agentv1.RestartPolicy{Mode: agentv1.RestartPolicy_MODE_ON_FAILURE, MaxRetries: 5}, DriverOptions: options,
			Keyless: true, SecretRotation: &agentv1.SecretRotation{Action: agentv1.SecretRotation_ACTION_SIGNAL},
			AutoForward: &agentv1.AutoForward{Mode: agentv1.AutoForward_MODE_OFFER, DenyPorts: []uint32{5432}},
		},
		Status: &agentv1.SandboxStatus{
			Phase: agentv1.Phase_PHASE_READY, Generation: 7, Message: "all is well",
			StartTime: ago(3*time.Minute + 20*time.Second), ReadyTime: ago(3*time.Minute + 19*time.Second + 688*time.Millisecond),
			LastActivityTime: ago(5 * time.Second), RestartCount: 2,
			Exit:      &agentv1.Exit{Code: 137, Time: ago(4 * time.Minute), OomKilled: true, Signal: "SIGKILL"},
			Endpoints: []*agentv1.Endpoint{{Name: "8080", Address: "127.0.0.1:12001", GuestPort: 8080, Generation: 7}},
			Resources: &agentv1.Resources{CpuMillis: 500, MemoryMib: 512, Pids: 100},
			DetectedPorts: []*agentv1.DetectedPort{
				{GuestPort: 3000, Protocol: agentv1.Protocol_PROTOCOL_TCP, Program: "node"},
				{GuestPort: 68, Protocol: agentv1.Protocol_PROTOCOL_UDP, Refusal: "DHCP is never forwarded by itself"},
			},
			GuestdVersion: "1.2.3",
			Exposures: []*agentv1.Exposure{
				{
					Source: "/home/ada/shop", Target: "/workspace", TotalCount: 19, Incomplete: true, Files: []*agentv1.ExposedFile{
						{Path: ".env", Kind: agentv1.ExposedFile_KIND_ENVIRONMENT}, {Path: "tls/tls.key", Kind: agentv1.ExposedFile_KIND_KEY},
					},
				},
				{Source: "/home/ada/data", Target: "/data", Incomplete: true},
			},
		},
	}
}

// golden compares with testdata/NAME, or writes it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (UPDATE_GOLDEN=1 writes it anew):\n%s", name, diff)
	}
}

func TestShowPage(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	if err := sandboxPage(fullSandbox(), noon).write(&b, terminal{}.bold); err != nil {
		t.Fatal(err)
	}
	golden(t, "show.golden", b.String())
}

func TestListTable(t *testing.T) {
	t.Parallel()
	sb := func(name string, phase agentv1.Phase, change func(*agentv1.SandboxStatus)) *agentv1.Sandbox {
		s := &agentv1.Sandbox{
			Name: name, CreateTime: ago(26 * time.Hour),
			Spec:   &agentv1.SandboxSpec{Source: &agentv1.SandboxSpec_Image{Image: "docker.io/acme/app@sha256:" + strings.Repeat("0123456789abcdef", 4)}},
			Status: &agentv1.SandboxStatus{Phase: phase, Generation: 1, StartTime: ago(2 * time.Hour)},
		}
		if change != nil {
			change(s.GetStatus())
		}
		return s
	}
	var b bytes.Buffer
	a := &app{stdout: &b, stderr: &b}
	rows := []*agentv1.Sandbox{
		fullSandbox(),
		sb("a", agentv1.Phase_PHASE_CREATING, nil), sb("b", agentv1.Phase_PHASE_STARTING, nil),
		sb("c", agentv1.Phase_PHASE_STOPPED, func(s *agentv1.SandboxStatus) { s.Reason = "IDLE" }),
		sb("d", agentv1.Phase_PHASE_FAILED, func(s *agentv1.SandboxStatus) { s.Exit = &agentv1.Exit{Code: 3} }),
		sb("e", agentv1.Phase_PHASE_FAILED, func(s *agentv1.SandboxStatus) { s.Exit = &agentv1.Exit{Code: 137, OomKilled: true} }),
		sb("f", agentv1.Phase_PHASE_BACKOFF, func(s *agentv1.SandboxStatus) { s.NextRestartTime = ago(-40 * time.Second) }),
		sb("g", agentv1.Phase_PHASE_UNSPECIFIED, nil), sb("a-machine", agentv1.Phase_PHASE_HIBERNATED, nil),
	}
	rows[len(rows)-1].Spec.Source = &agentv1.SandboxSpec_Machine{Machine: "nixos"}
	if err := a.listTable(rows, true, noon); err != nil {
		t.Fatal(err)
	}
	golden(t, "list.golden", b.String())
}

func TestYAMLSaysWhatJSONSays(t *testing.T) {
	t.Parallel()
	tricky := map[string]any{
		"yes": "yes", "on": "on", "null": "null", "number": "12", "sexagesimal": "1:20", "float": "1e3", "empty": "", "space": " x ", "date": "2001-01-01",
		"lines": "a\nb\n", "quote": `"'`, "hash": "#x", "colon": "a: b", "dash": "- x", "unicode": "日本 😀", "tab": "a\tb", "tilde": "~", "list": []any{}, "map": map[string]any{},
		"nested": map[string]any{"list": []any{"x", true, nil, 1.5}}, "html": "<a&b>", "control": "\x01", "separator": "a\u2028b", "merge": map[string]any{"<<": "x"},
	}
	data, err := json.Marshal(tricky)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := writeYAML(&b, data); err != nil {
		t.Fatal(err)
	}
	var back map[string]any
	if err := yaml.Unmarshal(b.Bytes(), &back); err != nil {
		t.Fatalf("%v\n%s", err, b.String())
	}
	if diff := cmp.Diff(tricky, back); diff != "" {
		t.Errorf("%s\n%s", diff, b.String())
	}
}

func TestJSONIsStable(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"json", "yaml"} {
		var b bytes.Buffer
		a := &app{stdout: &b, output: format}
		if err := a.print(messages([]*agentv1.Sandbox{fullSandbox()})); err != nil {
			t.Fatal(err)
		}
		golden(t, "sandboxes."+format, b.String())
	}
}

// Entries of one instant are neither doubled nor lost when a log is resumed.
func TestLogResumesWithinOneInstant(t *testing.T) {
	t.Parallel()
	entry := func(at time.Duration, text string) *agentv1.StreamSandboxLogsResponse {
		return &agentv1.StreamSandboxLogsResponse{Time: ago(at), Data: []byte(text)}
	}
	w := &logWriter{}
	for _, e := range []*agentv1.StreamSandboxLogsResponse{entry(2, "a"), entry(1, "b"), entry(1, "c")} {
		if w.known(e) {
			t.Errorf("%s is taken for known", e.GetData())
		}
	}
	w.skip = w.seen // resumed since ago(1)
	got := ""
	for _, e := range []*agentv1.StreamSandboxLogsResponse{entry(1, "b"), entry(1, "c"), entry(1, "d"), entry(0, "e")} {
		if !w.known(e) {
			got += string(e.GetData())
		}
	}
	if got != "de" {
		t.Errorf("printed %q after resuming", got)
	}
}
