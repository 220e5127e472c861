package server_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

// put writes a file, and the folders above it.
func put(t *testing.T, text string, at ...string) {
	t.Helper()
	file := filepath.Join(at...)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// What looks like secrets in a mounted folder is named: when it is only asked
// whether a sandbox could be made, when it is made, and at each boot.
func TestMountedSecretsAreNamedThroughTheAPI(t *testing.T) {
	t.Parallel()
	var log logged
	agent := startAgent(t, agentOptions{Drivers: processes(t), Log: &log})
	c := dial(t, agent)
	ctx := t.Context()
	const canary = "c4n4ry"
	sources, data := t.TempDir(), t.TempDir()
	put(t, "API_KEY="+canary, sources, ".env")
	put(t, "-----BEGIN OPENSSH PRIVATE KEY-----\n"+canary, sources, "deploy", "id_ed25519")
	put(t, "hello", sources, "README.md")
	put(t, "rows", data, "db")
	sb := &agentv1.Sandbox{Name: "web", Spec: wire(t, process.Spec("sleep"))}
	sb.Spec.Mounts = []*agentv1.Mount{
		{Kind: agentv1.Mount_KIND_DATA, Source: data},
		{Kind: agentv1.Mount_KIND_WORKSPACE, Source: sources, Target: "/src"},
	}
	both := []*agentv1.Exposure{{
		Source: sources, Target: "/src", TotalCount: 2, Files: []*agentv1.ExposedFile{
			{Path: ".env", Kind: agentv1.ExposedFile_KIND_ENVIRONMENT},
			{Path: "deploy/id_ed25519", Kind: agentv1.ExposedFile_KIND_KEY},
		},
	}}
	shows := func(when string, got *agentv1.Sandbox, err error, want []*agentv1.Exposure) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		if diff := cmp.Diff(want, got.GetStatus().GetExposures(), protocmp.Transform()); diff != "" {
			t.Errorf("%s:\n%s", when, diff)
		}
	}
	could, err := c.sandboxes.CreateSandbox(ctx, &agentv1.CreateSandboxRequest{Sandbox: sb, ValidateOnly: true})
	shows("validated", could.GetSandbox(), err, both)
	if log.contains("looks like secrets") {
		t.Error("it warns of a sandbox that was not made")
	}
	made, err := c.sandboxes.CreateSandbox(ctx, &agentv1.CreateSandboxRequest{Sandbox: sb, RequestId: "make"})
	shows("made", made.GetSandbox(), err, both)
	if !log.contains("mounted folder shows what looks like secrets") || !log.contains("deploy/id_ed25519") {
		t.Error("the log does not warn")
	}
	ensured, err := c.sandboxes.EnsureSandbox(ctx, &agentv1.EnsureSandboxRequest{Name: "web"})
	shows("booted", ensured.GetSandbox(), err, both)
	if err := os.Remove(filepath.Join(sources, ".env")); err != nil {
		t.Fatal(err)
	}
	again, err := c.sandboxes.RestartSandbox(ctx, &agentv1.RestartSandboxRequest{Name: "web", Grace: durationpb.New(0)})
	both[0].Files, both[0].TotalCount = both[0].Files[1:], 1
	shows("one moved out", again.GetSandbox(), err, both)
	got, err := c.sandboxes.GetSandbox(ctx, &agentv1.GetSandboxRequest{Name: "web"})
	shows("asked for", got.GetSandbox(), err, both)
	if err := os.RemoveAll(filepath.Join(sources, "deploy")); err != nil {
		t.Fatal(err)
	}
	again, err = c.sandboxes.RestartSandbox(ctx, &agentv1.RestartSandboxRequest{Name: "web", Grace: durationpb.New(0)})
	shows("both moved out", again.GetSandbox(), err, nil)
	if log.contains(canary) {
		t.Error("the log has what a file holds")
	}
	if _, err := c.sandboxes.DeleteSandbox(ctx, &agentv1.DeleteSandboxRequest{Name: "web"}); err != nil {
		t.Error(err)
	}
}

// A mount with something that the API does not have, as patterns to leave out
// would be, is refused.
func TestMountsThatLeaveFilesOutAreRefused(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: processes(t)})
	c := dial(t, agent)
	mount := &agentv1.Mount{Kind: agentv1.Mount_KIND_WORKSPACE, Source: t.TempDir()}
	mount.ProtoReflect().SetUnknown(protowire.AppendString(protowire.AppendTag(nil, 777, protowire.BytesType), ".env"))
	sb := &agentv1.Sandbox{Name: "web", Spec: wire(t, process.Spec("sleep"))}
	sb.Spec.Mounts = []*agentv1.Mount{mount}
	_, err := c.sandboxes.CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{Sandbox: sb})
	wantError(t, err, codes.Unimplemented, "UNSUPPORTED", "spec.mounts[0]")
}
