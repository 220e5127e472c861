package process_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

// TestKilledShim kills the supervisor, of which nothing else is left to say
// how the workload ended.
func TestKilledShim(t *testing.T) {
	t.Parallel()
	dir := root(t)
	d, ref := box(t, process.Config{Root: dir, Owner: owner}, process.Spec("ignore-term"))
	for range 3 {
		if err := d.Start(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
		pids, err := process.Processes(dir)
		if err != nil || len(pids) != 2 {
			t.Fatalf("processes %v, %v; want shim and workload", pids, err)
		}
		for _, pid := range pids {
			cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(cmdline), "-process-shim") {
				shim, err := os.FindProcess(pid)
				if err == nil {
					err = shim.Kill()
				}
				if err != nil {
					t.Fatal(err)
				}
			}
		}
		o, err := d.Wait(t.Context(), ref)
		if err != nil || o.State != sandbox.StateExited || o.ExitCode != 137 || o.Detail == "" {
			t.Errorf("Wait says %+v, %v; want exited with 137, and why", o, err)
		}
		if again, err := d.Inspect(t.Context(), ref); err != nil || again.State != sandbox.StateExited {
			t.Errorf("Inspect says %+v, %v; want exited", again, err)
		}
	}
}
