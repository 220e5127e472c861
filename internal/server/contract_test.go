package server_test

import (
	"os"
	"testing"

	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
	"github.com/choiros/agent/internal/server/servertest"
	"github.com/choiros/agent/internal/vm/vmtest"
)

func TestMain(m *testing.M) {
	process.Main()
	vmtest.Main()
	os.Exit(m.Run())
}

// processes are the drivers of an agent whose sandboxes are child processes,
// none of which may be left when the test has ended.
func processes(t testing.TB) func(owner string) map[string]sandbox.Driver {
	t.Helper()
	root, err := os.MkdirTemp("", "pr") // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		pids, err := process.Processes(root)
		if err != nil {
			t.Error(err)
		}
		for _, pid := range pids {
			if p, err := os.FindProcess(pid); err == nil {
				_ = p.Kill()
			}
		}
		_ = os.RemoveAll(root)
	})
	return func(owner string) map[string]sandbox.Driver {
		return map[string]sandbox.Driver{process.Name: process.New(process.Config{Root: root, Owner: owner})}
	}
}

func TestContractThroughClientServerAndManager(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{
		Drivers: processes(t), Manager: manager.Config{MaxConcurrentBoots: 50},
	})
	conn := agent.Dial(t)
	drivertest.Run(t, drivertest.Harness{
		Open: func(*testing.T) sandbox.Driver { return servertest.NewExtended(conn, process.Name) },
		Spec: func(_ *testing.T, w drivertest.Workload) sandbox.Spec {
			spec := process.Spec(w.Args...)
			spec.Mounts, spec.Env = w.Mounts, w.Env
			return spec
		},
		GuestDir: process.GuestDir,
		Without: drivertest.Without{
			Dial:      true, // guestd brings what goes over it
			Configure: true, // the manager does
		},
	})
}
