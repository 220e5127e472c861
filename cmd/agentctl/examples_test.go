package main

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// example reads a file of docs/examples, and has the rest be as it is when it
// is started.
func example(t *testing.T, name string) *agentv1.Sandbox {
	t.Helper()
	d, err := readSpecFile("../../docs/examples/"+name, "/Users/wiz")
	if err == nil {
		err = d.complete("/Users/wiz")
	}
	if err != nil {
		t.Fatal(err)
	}
	return d.message()
}

func TestMacDayExampleIsWhatThePageSays(t *testing.T) {
	t.Parallel()
	got := example(t, "mac-day.yaml")
	want := &agentv1.Sandbox{
		Name: "choiros",
		Spec: &agentv1.SandboxSpec{
			Driver:     "vm",
			Source:     &agentv1.SandboxSpec_Machine{Machine: "nixos"},
			Command:    []string{"just", "dev-sandbox"},
			WorkingDir: "/workspace",
			Env:        map[string]string{"DATABASE_URL": "/data/events.db"},
			Resources:  &agentv1.Resources{CpuMillis: 4000, MemoryMib: 4096},
			Mounts: []*agentv1.Mount{
				{Kind: agentv1.Mount_KIND_WORKSPACE, Source: "/Users/wiz/choiros-rs", Target: "/workspace", ReadWrite: true},
				{Kind: agentv1.Mount_KIND_DATA, Source: "/Users/wiz/.choiros-data", Target: "/data"},
			},
			Secrets: []*agentv1.SecretRef{{Name: "*", Source: "env-file:/Users/wiz/.choiros-secrets/sandbox.env"}},
			Ports: []*agentv1.Port{
				{Name: "ssh", HostPort: 2222, GuestPort: 22, Protocol: agentv1.Protocol_PROTOCOL_TCP},
				{Name: "web", HostPort: 8080, GuestPort: 8080, Protocol: agentv1.Protocol_PROTOCOL_TCP},
			},
		},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	// From an image it is the same but for its name.
	want.Name, want.Spec.Source = "choiros-image", &agentv1.SandboxSpec_Image{Image: "localhost/choiros-dev:latest"}
	if diff := cmp.Diff(want, example(t, "mac-day-image.yaml"), protocmp.Transform()); diff != "" {
		t.Errorf("from an image: %s", diff)
	}
}

func TestExamplesShareNoSecrets(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../../docs/examples/*.yaml")
	if err != nil || len(files) < 2 {
		t.Fatalf("%q, %v", files, err)
	}
	page := doc(t, "mac-day.md")
	for _, file := range files {
		name := filepath.Base(file)
		spec := example(t, name).GetSpec()
		for _, secret := range spec.GetSecrets() {
			_, path, _ := strings.Cut(secret.GetSource(), ":")
			if slices.ContainsFunc(spec.GetMounts(), func(m *agentv1.Mount) bool { return strings.HasPrefix(path, m.GetSource()+"/") }) {
				t.Errorf("%s: %s is in a folder that is shared", name, path)
			}
		}
		if !strings.Contains(page, "(examples/"+name+")") {
			t.Errorf("docs/mac-day.md does not name %s", name)
		}
	}
	if !strings.Contains(page, "```yaml\n"+doc(t, "examples/mac-day.yaml")+"```") {
		t.Error("docs/mac-day.md does not have the text of mac-day.yaml")
	}
}
