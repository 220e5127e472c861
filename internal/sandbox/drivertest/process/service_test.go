//go:build hosttest

package process_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

// serviceDir is the variable that makes this test what runs in the service: it
// has a folder.
const serviceDir = "SERVICE_DIR"

// TestSandboxOutlivesTheServiceThatStartedIt needs a service manager, which
// test/env/host-test boots; hence the build tag. The manager ends what is left
// of a service when that ends, and a sandbox is not to be among it.
func TestSandboxOutlivesTheServiceThatStartedIt(t *testing.T) {
	config := func(dir string) process.Config { return process.Config{Root: dir, Owner: owner} }
	if dir := os.Getenv(serviceDir); dir != "" {
		d := process.New(config(dir))
		ref := sandbox.Ref{ID: "outlives", Dir: filepath.Join(dir, "ref")}
		if err := d.Create(t.Context(), ref, process.Spec("sleep")); err != nil {
			t.Fatal(err)
		}
		if err := d.Start(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
		return
	}
	dir := t.TempDir()
	ref := sandbox.Ref{ID: "outlives", Dir: filepath.Join(dir, "ref")}
	if err := os.Mkdir(ref.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "systemd-run", "--user", "--wait", "--collect", "--pipe",
		"--setenv="+serviceDir+"="+dir, self, "-test.run", "^"+t.Name()+"$").CombinedOutput()
	if err != nil {
		t.Fatalf("the service: %v\n%s", err, out)
	}
	d := process.New(config(dir))
	defer func() {
		if err := d.Delete(t.Context(), ref); err != nil {
			t.Error(err)
		}
		// The manager takes a moment to notice.
		for deadline := time.Now().Add(20 * time.Second); scopes(t) != ""; time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Errorf("left: %s", scopes(t))
				break
			}
		}
	}()
	if o, err := d.Inspect(t.Context(), ref); err != nil || o.State != sandbox.StateRunning {
		t.Errorf("after the service has ended it is %+v, %v", o, err)
	}
	pids, err := process.Processes(dir)
	if err != nil || len(pids) == 0 {
		t.Fatalf("processes %v, %v", pids, err)
	}
	for _, pid := range pids {
		group, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
		if err != nil || !strings.Contains(string(group), "/choiros-outlives-") {
			t.Errorf("process %d is in %q, %v; want a scope of its own", pid, group, err)
		}
	}
}

func scopes(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("systemctl", "--user", "--plain", "--no-legend", "list-units", "choiros-*.scope").Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}
