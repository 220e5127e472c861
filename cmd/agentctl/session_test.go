//go:build linux

package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/term"
)

// onTerminal is agentctl run as a child on a terminal that the test types on.
type onTerminal struct {
	t      *testing.T
	ours   *os.File
	theirs *os.File
	cmd    *exec.Cmd

	mu     sync.Mutex
	screen bytes.Buffer
	grown  chan struct{}
}

// startOnTerminal runs agentctl against an agent, on a terminal of 80 by 24.
func startOnTerminal(t *testing.T, agent *fakeAgent, args ...string) *onTerminal {
	t.Helper()
	ours, theirs, err := openPTY()
	if err != nil {
		t.Fatal(err)
	}
	if err := setSize(ours, 80, 24); err != nil {
		t.Fatal(err)
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	o := &onTerminal{t: t, ours: ours, theirs: theirs, cmd: exec.Command(program, args...), grown: make(chan struct{})}
	o.cmd.Args[0] = "agentctl" // TestMain makes it main
	o.cmd.Env = append(os.Environ(), "CHOIROS_AGENT=unix://"+agent.address, "TERM=xterm", "NO_COLOR=")
	o.cmd.Stdin, o.cmd.Stdout, o.cmd.Stderr = theirs, theirs, theirs
	o.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := o.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var reader sync.WaitGroup
	reader.Go(func() {
		chunk := make([]byte, 4096)
		for {
			n, err := ours.Read(chunk)
			o.mu.Lock()
			o.screen.Write(chunk[:n])
			close(o.grown)
			o.grown = make(chan struct{})
			o.mu.Unlock()
			if err != nil {
				return
			}
		}
	})
	t.Cleanup(func() {
		_ = o.cmd.Process.Kill()
		_ = o.cmd.Wait()
		theirs.Close()
		ours.Close()
		reader.Wait()
	})
	return o
}

// sees waits until the terminal has shown a text since the last that was seen.
func (o *onTerminal) sees(text string) {
	o.t.Helper()
	late := time.After(20 * time.Second)
	for {
		o.mu.Lock()
		shown, grown := o.screen.String(), o.grown
		if i := strings.Index(shown, text); i >= 0 {
			o.screen.Next(i + len(text))
			o.mu.Unlock()
			return
		}
		o.mu.Unlock()
		select {
		case <-grown:
		case <-late:
			o.t.Fatalf("the terminal never showed %q, but %q", text, shown)
		}
	}
}

func (o *onTerminal) types(keys string) {
	o.t.Helper()
	if _, err := io.WriteString(o.ours, keys); err != nil {
		o.t.Fatal(err)
	}
}

// raw reports whether the terminal gives keys as they are typed.
func (o *onTerminal) raw() bool {
	o.t.Helper()
	state, err := term.GetState(int(o.theirs.Fd()))
	if err != nil {
		o.t.Fatal(err)
	}
	before := *state
	if _, err := term.MakeRaw(int(o.theirs.Fd())); err != nil {
		o.t.Fatal(err)
	}
	now, err := term.GetState(int(o.theirs.Fd()))
	if err != nil {
		o.t.Fatal(err)
	}
	if err := term.Restore(int(o.theirs.Fd()), &before); err != nil {
		o.t.Fatal(err)
	}
	return *now == before
}

// ends waits for agentctl's end and checks that the terminal is as it was.
func (o *onTerminal) ends(status int) {
	o.t.Helper()
	_ = o.cmd.Wait()
	if got := o.cmd.ProcessState.ExitCode(); got != status {
		o.t.Errorf("exit status %d, want %d", got, status)
	}
	if o.raw() {
		o.t.Error("the terminal was left raw")
	}
}

// running returns an agent with a sandbox that runs.
func running(t *testing.T, names ...string) *fakeAgent {
	t.Helper()
	agent := serveFake(t)
	for _, name := range names {
		exit, _, errs := agentctl(t, map[string]string{"CHOIROS_AGENT": "unix://" + agent.address},
			"sandbox", "start", name, "--image", "localhost/app:1", "--no-workspace", "-q")
		if exit != 0 {
			t.Fatal(errs)
		}
	}
	return agent
}

func TestExecOnATerminal(t *testing.T) {
	t.Parallel()
	o := startOnTerminal(t, running(t, "web"), "sandbox", "exec", "-it", "web", "--", "sh", "-c",
		`stty size; echo $TERM; trap 'stty size; echo resized' WINCH; trap 'echo "interrupted"; exit 9' INT; echo ready; while :; do sleep 0.02; done`)
	o.sees("24 80")
	o.sees("xterm")
	o.sees("ready")
	if !o.raw() {
		t.Error("the terminal is not raw")
	}
	if err := setSize(o.ours, 100, 30); err != nil {
		t.Fatal(err)
	}
	o.sees("30 100")
	o.types("\x03") // Ctrl-C goes to the command's terminal, which interrupts it
	o.sees("interrupted")
	o.ends(9)
}

func TestDetachKeysLeaveItRunning(t *testing.T) {
	t.Parallel()
	agent := running(t, "web")
	o := startOnTerminal(t, agent, "sandbox", "exec", "-it", "web", "--", "cat")
	o.types("one\r")
	o.sees("one\r\none")
	o.types("\x10\x11")
	o.sees("e1 runs on; agentctl exec attach web e1 takes it up again")
	o.ends(0)

	again := startOnTerminal(t, agent, "exec", "attach", "web", "e1")
	again.types("two\r")
	again.sees("two\r\ntwo")
	again.types("\x04") // Ctrl-D ends cat
	again.ends(0)
}

func TestSignalsRestoreTheTerminal(t *testing.T) {
	t.Parallel()
	agent := running(t, "web")
	for signal, status := range map[syscall.Signal]int{syscall.SIGTERM: 143, syscall.SIGHUP: 129, syscall.SIGQUIT: 131} {
		for _, args := range [][]string{{"sandbox", "exec", "-it", "web", "--", "sh", "-c", "echo ready; sleep 60"}, {"top", "--interval", "100ms"}} {
			o := startOnTerminal(t, agent, args...)
			o.sees(map[string]string{"sandbox": "ready", "top": "running"}[args[0]])
			if err := o.cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			o.ends(status)
			if args[0] == "top" {
				o.sees(leaveScreen)
			}
		}
	}
}

func TestLosingTheAgentRestoresTheTerminal(t *testing.T) {
	t.Parallel()
	agent := running(t, "web")
	o := startOnTerminal(t, agent, "sandbox", "shell", "web")
	o.types("echo ab''cd\r")
	o.sees("abcd")
	agent.stop()
	o.sees("the connection was lost while the command ran")
	o.ends(8)
	if err := agent.start(); err != nil {
		t.Fatal(err)
	}
}

func TestSecretIsAskedForWithoutEcho(t *testing.T) {
	t.Parallel()
	agent := serveFake(t)
	o := startOnTerminal(t, agent, "sandbox", "start", "web", "--image", "localhost/app:1", "--no-workspace", "--secret-value", "KEY")
	o.sees("Value of KEY (not shown): ")
	o.types("canary\r")
	o.sees("is ready")
	o.ends(0)
	o.mu.Lock()
	defer o.mu.Unlock()
	if strings.Contains(o.screen.String(), "canary") {
		t.Error("the value was shown")
	}
	if got := agent.sandboxes["web"].values["KEY"]; got != "canary" {
		t.Errorf("the agent was given %q", got)
	}
	stopped := startOnTerminal(t, agent, "secret", "set", "web", "KEY")
	stopped.sees("(not shown): ")
	stopped.types("\x03")
	stopped.ends(130)
}

func TestTopOnATerminal(t *testing.T) {
	t.Parallel()
	o := startOnTerminal(t, running(t, "web", "worker"), "top", "--interval", "100ms")
	o.sees(enterScreen)
	o.sees("50.0%")
	o.types("a\x1b[B\r")
	o.sees("server-of-web")
	if err := setSize(o.ours, 50, 20); err != nil {
		t.Fatal(err)
	}
	o.types("\x1b[B")
	o.sees("server-of-worker")
	o.types("q")
	o.sees(leaveScreen)
	o.ends(0)
}

func TestKeyFilter(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		keys     string
		typed    []string
		pass     string
		complete bool
	}{
		{"ctrl-p,ctrl-q", []string{"ab\x10\x11cd"}, "ab", true},
		{"ctrl-p,ctrl-q", []string{"a\x10", "\x11"}, "a", true},
		{"ctrl-p,ctrl-q", []string{"\x10", "b"}, "\x10b", false},
		{"ctrl-p,ctrl-q", []string{"\x10\x10", "\x11"}, "\x10", true},
		{"a,a,b", []string{"aaa", "b"}, "a", true},
		{"a,b,a,c", []string{"ababac"}, "ab", true},
		{"", []string{"\x10\x11"}, "\x10\x11", false},
		{"~,.", []string{"~~."}, "~", true},
	} {
		keys, err := parseKeys(test.keys)
		if err != nil {
			t.Fatal(err)
		}
		filter, pass, complete := &keyFilter{keys: keys}, "", false
		for _, typed := range test.typed {
			p, done := filter.feed([]byte(typed))
			pass, complete = pass+string(p), complete || done
		}
		if pass != test.pass || complete != test.complete {
			t.Errorf("%q of %q: passed %q, complete %v", test.typed, test.keys, pass, complete)
		}
	}
	for _, bad := range []string{"ctrl-1", "ctrl-", ",", "ab", "ctrl-p,"} {
		if keys, err := parseKeys(bad); err == nil {
			t.Errorf("parseKeys(%q) = %q", bad, keys)
		}
	}
}
