package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/choiros/agent/internal/sandbox"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"agentctl": main})
}

// TestScripts runs the real program against a fake agent: testdata/*.txtar.
func TestScripts(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir:           "testdata",
		UpdateScripts: os.Getenv("UPDATE_GOLDEN") != "",
		Setup: func(env *testscript.Env) error {
			dir, err := os.MkdirTemp("", "agentctl") // t.TempDir is too long for a socket
			if err != nil {
				return err
			}
			agent := newFakeAgent("unix", filepath.Join(dir, "agent.sock"))
			if err := agent.start(); err != nil {
				return err
			}
			env.Defer(func() {
				agent.close()
				_ = os.RemoveAll(dir)
			})
			env.Values["agent"] = agent
			env.Setenv("CHOIROS_AGENT", "unix://"+agent.address)
			env.Setenv("SOCKET", agent.address)
			env.Setenv("HOME", filepath.Join(env.WorkDir, "home"))
			env.Setenv("TZ", "UTC")
			return os.MkdirAll(filepath.Join(env.WorkDir, "home"), 0o755)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"fake":   scriptFake,
			"signal": scriptSignal,
			"until":  scriptUntil,
		},
	})
}

// scriptFake does something to the fake agent.
func scriptFake(ts *testscript.TestScript, _ bool, args []string) {
	agent := ts.Value("agent").(*fakeAgent)
	if len(args) == 0 {
		ts.Fatalf("usage: fake stop|start|restart|cut|forget|mutations N|refuse KIND")
	}
	switch args[0] {
	case "stop":
		agent.stop()
	case "start":
		ts.Check(agent.start())
	case "restart":
		agent.stop()
		ts.Check(agent.start())
	case "cut": // the next mutation does its work, and its answer is lost
		agent.mu.Lock()
		agent.cut = true
		agent.mu.Unlock()
	case "forget": // past changes, so that watchers cannot resume
		agent.mu.Lock()
		agent.forgotten = len(agent.changes) + 1
		agent.mu.Unlock()
	case "mutations": // how many requests with an id there were
		agent.mu.Lock()
		defer agent.mu.Unlock()
		if got := fmt.Sprint(agent.mutations); got != args[1] {
			ts.Fatalf("%s mutations, not %s", got, args[1])
		}
		agent.mutations = 0
	case "refuse": // the next mutation
		agent.mu.Lock()
		defer agent.mu.Unlock()
		agent.refuse = map[string]error{
			"unavailable": errGone,
			"exhausted":   fail(&sandbox.RetryError{Err: fmt.Errorf("start web: %w", sandbox.ErrExhausted), After: 30 * time.Second}, "web"),
			"denied":      fail(fmt.Errorf("start web: %w", sandbox.ErrDenied), "web"),
			"superseded":  fail(fmt.Errorf("start web: %w", sandbox.ErrSuperseded), "web"),
			"internal":    fail(fmt.Errorf("start web: a bug"), "web"),
		}[args[1]]
		if agent.refuse == nil {
			ts.Fatalf("unknown refusal %s", args[1])
		}
	default:
		ts.Fatalf("unknown: fake %s", args[0])
	}
}

// scriptUntil waits until a file holds a text: until FILE TEXT.
func scriptUntil(ts *testscript.TestScript, _ bool, args []string) {
	deadline := time.Now().Add(20 * time.Second)
	for {
		data, _ := os.ReadFile(ts.MkAbs(args[0]))
		if strings.Contains(string(data), args[1]) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%s never held %q, but:\n%s", args[0], args[1], data)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// scriptSignal signals the process whose pid a file holds: signal INT FILE.
func scriptSignal(ts *testscript.TestScript, _ bool, args []string) {
	pid, err := strconv.Atoi(strings.TrimSpace(ts.ReadFile(args[1])))
	if err != nil || pid <= 1 {
		ts.Fatalf("%s holds no pid", args[1])
	}
	ts.Check(syscall.Kill(pid, map[string]syscall.Signal{"INT": syscall.SIGINT, "TERM": syscall.SIGTERM}[args[0]]))
}
