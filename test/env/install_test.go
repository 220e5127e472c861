//go:build hosttest

package env

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestInstalledAgentIsRemovedWithoutATrace takes the agent through what
// agentctl does to it, on a systemd that is real, and looks each time whether
// the sandbox noticed.
func TestInstalledAgentIsRemovedWithoutATrace(t *testing.T) {
	before := traces(t)
	install := func(args ...string) string {
		return run(t, "agentctl", append([]string{"agent", "install"}, args...)...)
	}
	t.Cleanup(func() { // what a failure left
		_ = exec.Command("agentctl", "agent", "stop").Run()
		_ = exec.Command("agentctl", "agent", "uninstall").Run()
	})
	t.Log(install())
	file := show(t, "FragmentPath")
	run(t, "systemd-analyze", "--user", "verify", file)
	first := status(t)
	if !first.Running || !first.ByService || !first.AtLogin || first.Unit != file {
		t.Errorf("after installing: %+v, and the unit is %s", first, file)
	}
	run(t, "agentctl", "image", "load", "images/workload.oci.tar")
	run(t, "agentctl", "sandbox", "start", "kept", "--image", "localhost/choiros/workload:latest", "--no-workspace", "--", "listen", "127.0.0.1:"+guestPort)
	workload := run(t, "podman", "inspect", "--format", "{{.State.Pid}}", run(t, "podman", "ps", "--quiet"))
	wantKeptRunning := func(after string) {
		t.Helper()
		if pid, err := strconv.Atoi(workload); err != nil || syscall.Kill(pid, 0) != nil {
			t.Fatalf("%s, process %s of the sandbox is gone (%v)", after, workload, err)
		}
	}

	// Killed, it comes back.
	run(t, "systemctl", "--user", "kill", "--kill-whom=main", "--signal=KILL", unit)
	second := awaitOther(t, first.PID)
	wantKeptRunning("after the agent was killed")

	// A configuration that it refuses changes nothing.
	if err := os.WriteFile("bad.toml", []byte("max_runing = 3\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	wantFailure(t, "unknown key max_runing", "agent", "install", "--config", "bad.toml")
	if now := status(t); !now.Running || now.PID != second.PID {
		t.Errorf("after a refused installation: %+v, was process %d", now, second.PID)
	}

	// Installed anew with other settings, it restarts.
	if err := os.WriteFile("good.toml", []byte("log_level = \"debug\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Log(install("--config", "good.toml"))
	if now := status(t); !now.Running || now.PID == second.PID {
		t.Errorf("after installing anew: %+v", now)
	}
	if command := show(t, "ExecStart"); !strings.Contains(command, "good.toml") {
		t.Errorf("the unit starts %s", command)
	}
	if said := run(t, "agentctl", "agent", "logs", "-n", "500"); !strings.Contains(said, "agent serves") || !strings.Contains(said, "level=DEBUG") {
		t.Errorf("the log: %s", said)
	}
	wantKeptRunning("after installing anew")

	// Stopped, it stays so until it is needed.
	run(t, "agentctl", "agent", "stop")
	wantKeptRunning("after the agent was stopped")
	wantFailure(t, "it is not running", "sandbox", "start", "kept", "--no-workspace")
	if said := run(t, "agentctl", "sandbox", "start", "kept", "--no-workspace", "--start-agent"); !strings.Contains(said, "running already") {
		t.Errorf("a start of what runs said %s", said)
	}
	if now := status(t); !now.ByService {
		t.Errorf("after --start-agent: %+v", now)
	}

	// Removed, nothing is left but data.
	t.Log("\n" + run(t, "agentctl", "agent", "uninstall"))
	wantKeptRunning("after the agent was uninstalled")
	if after := traces(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if state := show(t, "LoadState"); state != "not-found" {
		t.Errorf("the unit is %s", state)
	}

	// Without a service it runs in the background.
	if said := run(t, "agentctl", "sandbox", "start", "kept", "--no-workspace", "--start-agent"); !strings.Contains(said, "running already") {
		t.Errorf("a start of what runs said %s", said)
	}
	if now := status(t); !now.Running || now.ByService || now.Unit != "" || !exists(now.Log) {
		t.Errorf("in the background: %+v", now)
	}
	wantFailure(t, "an agent runs already that no service keeps", "agent", "install")
	run(t, "agentctl", "sandbox", "delete", "kept", "--grace", "1s")
	run(t, "agentctl", "agent", "stop")
	t.Log("\n" + run(t, "agentctl", "agent", "uninstall"))
	if after := traces(t); after != before {
		t.Errorf("before:\n%s\nafter all:\n%s", before, after)
	}
}

// traces lists whatever of the agent's is where the user's things are, but for
// its data; processes too.
func traces(t *testing.T) string {
	t.Helper()
	var found []string
	for _, dir := range []string{os.Getenv("HOME"), os.Getenv("XDG_RUNTIME_DIR")} {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
				return nil
			case err != nil:
				return err
			case entry.IsDir() && strings.HasSuffix(path, "/.local/state/choiros-agent"):
				if exists(filepath.Join(path, "agent.log")) {
					found = append(found, path+"/agent.log")
				}
				return fs.SkipDir
			case entry.IsDir() && (strings.HasSuffix(path, "/containers") || strings.HasSuffix(path, "/libpod")):
				return fs.SkipDir // podman's
			case strings.Contains(path, "choiros") || strings.Contains(path, "/.config/systemd"):
				found = append(found, path)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	processes, _ := exec.Command("pgrep", "--exact", "agent").Output() // fails if there are none
	return strings.Join(append(found, strings.Fields(string(processes))...), "\n")
}

// agentStatus is what agentctl agent status tells programs.
type agentStatus struct {
	Running   bool   `json:"running"`
	PID       int    `json:"pid"`
	Unit      string `json:"unit"`
	AtLogin   bool   `json:"at_login"`
	ByService bool   `json:"by_service"`
	Log       string `json:"log"`
}

func status(t *testing.T) agentStatus {
	t.Helper()
	var s agentStatus
	text, _ := exec.Command("agentctl", "agent", "status", "-o", "json").Output() // fails if it does not run
	if err := json.Unmarshal(text, &s); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return s
}

// awaitOther waits until the agent is another process.
func awaitOther(t *testing.T, than int) agentStatus {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(time.Minute); ; <-tick.C {
		s := status(t)
		if s.Running && s.PID != than {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("no other agent came: %+v", s)
		}
	}
}

// wantFailure runs agentctl and expects that it fails and says so.
func wantFailure(t *testing.T, says string, args ...string) {
	t.Helper()
	text, err := exec.Command("agentctl", args...).CombinedOutput()
	if err == nil || !strings.Contains(string(text), says) || !strings.Contains(string(text), "try: ") {
		t.Errorf("agentctl %s: %v, %s; want %q and what mends it", strings.Join(args, " "), err, text, says)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
