package process_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

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
		if err := start(t, d, ref); err != nil {
			t.Fatal(err)
		}
		var pids []int
		// A process that has only just begun shows no environment.
		for deadline := time.Now().Add(time.Minute); len(pids) != 3; {
			var err error
			if pids, err = process.Processes(dir); err != nil || time.Now().After(deadline) {
				t.Fatalf("processes %v, %v; want shim, guestd and workload", pids, err)
			}
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
