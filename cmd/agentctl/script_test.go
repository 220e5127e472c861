package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/choiros/agent/internal/sandbox"
)

func TestMain(m *testing.M) {
	testscript.Main(m, programs())
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
			env.Setenv("ARCH", runtime.GOARCH)
			if err := os.MkdirAll(filepath.Join(env.WorkDir, "home"), 0o755); err != nil {
				return err
			}
			return setupFakeHost(env)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"fake":   scriptFake,
			"signal": scriptSignal,
			"until":  scriptUntil,

			"echoserver": scriptEchoServer,
			"dialout":    scriptDialOut,
		},
	})
}

// scriptFake does something to the fake agent.
func scriptFake(ts *testscript.TestScript, _ bool, args []string) {
	agent := ts.Value("agent").(*fakeAgent)
	if len(args) == 0 {
		ts.Fatalf("usage: fake stop|start|restart|cut|forget|without PROGRAMS|archive|mutations N|refuse KIND")
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
	case "without": // programs that no sandbox has
		agent.mu.Lock()
		agent.noPrograms = args[1:]
		agent.mu.Unlock()
	case "archive": // what downloads have: a hostile stream
		agent.mu.Lock()
		agent.archive = hostileArchive()
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
	ts.Check(syscall.Kill(pid, map[string]syscall.Signal{"INT": syscall.SIGINT, "TERM": syscall.SIGTERM, "KILL": syscall.SIGKILL}[args[0]]))
}

// scriptEchoServer serves on 127.0.0.1 what it is sent, and its end, and puts
// its port in a variable: echoserver NAME.
func scriptEchoServer(ts *testscript.TestScript, _ bool, args []string) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	ts.Setenv(args[0], fmt.Sprint(listener.Addr().(*net.TCPAddr).Port))
}

// scriptDialOut sends a file to the address that begins another's first line,
// half-closes, and expects to read the same: dialout ADDRESSFILE FILE.
func scriptDialOut(ts *testscript.TestScript, _ bool, args []string) {
	address, _, _ := strings.Cut(ts.ReadFile(args[0]), " ")
	conn, err := net.Dial("tcp", address)
	ts.Check(err)
	defer conn.Close()
	want := ts.ReadFile(args[1])
	_, err = io.WriteString(conn, want)
	ts.Check(err)
	ts.Check(conn.(*net.TCPConn).CloseWrite())
	got, err := io.ReadAll(conn)
	ts.Check(err)
	if string(got) != want {
		ts.Fatalf("read %q, not %q", got, want)
	}
}
