package server_test

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

func TestEgressOverTheAPI(t *testing.T) {
	t.Parallel()
	root, err := os.MkdirTemp("", "pr")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(root) })
	driver := process.NewPoliced(process.Config{Root: root, Owner: "policed"})
	agent := startAgent(t, agentOptions{Drivers: func(string) map[string]sandbox.Driver {
		return map[string]sandbox.Driver{process.Name: driver}
	}})
	c := dial(t, agent)
	policy := &agentv1.Egress{Mode: agentv1.Egress_MODE_LIST, DenyPrivate: true, Rules: []*agentv1.EgressRule{
		{Name: "example.com", Ports: []*agentv1.PortRange{{From: 443}}, Protocol: agentv1.EgressRule_PROTOCOL_TCP},
	}}
	created, err := c.sandboxes.CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{
		Sandbox: &agentv1.Sandbox{Name: "web", Spec: &agentv1.SandboxSpec{
			Source: &agentv1.SandboxSpec_Image{Image: process.Image}, Command: []string{"sleep"}, Egress: policy,
		}}, Start: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := c.sandboxes.DeleteSandbox(context.Background(), &agentv1.DeleteSandboxRequest{Name: "web"}); err != nil {
			t.Error(err)
		}
	})
	if diff := cmp.Diff(policy, created.GetSandbox().GetSpec().GetEgress(), protocmp.Transform()); diff != "" {
		t.Errorf("created (-want +got):\n%s", diff)
	}
	update := func(policy *agentv1.Egress) (*agentv1.UpdateSandboxResponse, error) {
		return c.sandboxes.UpdateSandbox(t.Context(), &agentv1.UpdateSandboxRequest{
			Sandbox:    &agentv1.Sandbox{Name: "web", Spec: &agentv1.SandboxSpec{Egress: policy}},
			UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"spec.egress"}},
		})
	}
	ref := sandbox.Ref{ID: "web", Dir: agent.Store.SandboxDir("web")}
	deny := &agentv1.Egress{Mode: agentv1.Egress_MODE_DENY}
	updated, err := update(deny)
	if diff := cmp.Diff(deny, updated.GetSandbox().GetSpec().GetEgress(), protocmp.Transform()); err != nil || diff != "" {
		t.Errorf("updated: %v (-want +got):\n%s", err, diff)
	}
	if egress, err := driver.Egress(ref); err != nil || egress.Mode != sandbox.EgressDeny {
		t.Errorf("in force: %+v, %v", egress, err)
	}
	policy.Rules[0].Cidr = "192.0.2.0/24"
	_, err = update(policy)
	wantError(t, err, codes.InvalidArgument, "INVALID", "spec.egress.rules[0].cidr")

	at := time.Unix(1_800_000_000, 0)
	for _, r := range []sandbox.Refusal{
		{Destination: "192.0.2.1", Port: 443, Protocol: "tcp", Count: 2, Last: at},
		{Destination: "192.0.2.1", Port: 53, Protocol: "udp", Count: 1, Last: at},
		{Destination: "example.com\xff", Protocol: "dns", Count: 4, Last: at.Add(time.Second)},
	} {
		if err := driver.Refuse(t.Context(), ref, r); err != nil {
			t.Fatal(err)
		}
	}
	got, err := c.sandboxes.ListRefusals(t.Context(), &agentv1.ListRefusalsRequest{Name: "web"})
	want := &agentv1.ListRefusalsResponse{TotalCount: 7, Refusals: []*agentv1.Refusal{
		{Kind: agentv1.Refusal_KIND_DNS, Destination: "example.com\ufffd", Count: 4, LastTime: timestamppb.New(at.Add(time.Second))},
		{Kind: agentv1.Refusal_KIND_UDP, Destination: "192.0.2.1", Port: 53, Count: 1, LastTime: timestamppb.New(at)},
		{Kind: agentv1.Refusal_KIND_TCP, Destination: "192.0.2.1", Port: 443, Count: 2, LastTime: timestamppb.New(at)},
	}}
	if diff := cmp.Diff(want, got, protocmp.Transform()); err != nil || diff != "" {
		t.Errorf("refused: %v (-want +got):\n%s", err, diff)
	}
	_, err = c.sandboxes.ListRefusals(t.Context(), &agentv1.ListRefusalsRequest{Name: "nobody"})
	wantError(t, err, codes.NotFound, "NOT_FOUND", "")
}

func TestEgressThatNobodyEnforcesIsRefused(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: processes(t)})
	c := dial(t, agent)
	_, err := c.sandboxes.CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{Sandbox: &agentv1.Sandbox{
		Name: "web", Spec: &agentv1.SandboxSpec{
			Source: &agentv1.SandboxSpec_Image{Image: process.Image}, Egress: &agentv1.Egress{DenyPrivate: true},
		},
	}})
	wantError(t, err, codes.Unimplemented, "UNSUPPORTED", "spec.egress")
}
