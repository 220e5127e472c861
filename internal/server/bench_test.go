package server_test

import (
	"testing"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

// BenchmarkEnsure is what a router does for every request that it proxies.
func BenchmarkEnsure(b *testing.B) {
	agent := startAgent(b, agentOptions{Drivers: processes(b)})
	client := agentv1.NewSandboxServiceClient(agent.Dial(b))
	if _, err := agent.Manager.Create(b.Context(), manager.CreateRequest{
		Name: "web", Spec: process.Spec("sleep"), Start: true,
	}); err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := agent.Manager.Delete(b.Context(), "web", 0, true, manager.Request{}); err != nil {
			b.Error(err)
		}
	}()
	for b.Loop() {
		if _, err := client.EnsureSandbox(b.Context(), &agentv1.EnsureSandboxRequest{Name: "web"}); err != nil {
			b.Fatal(err)
		}
	}
}
