//go:build linux

package guestd

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

func (g *guest) memoryKiB() int {
	g.Helper()
	return g.status("VmRSS:")
}

// status returns a number from guestd's /proc/PID/status.
func (g *guest) status(name string) int {
	g.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", g.cmd.Process.Pid))
	if err != nil {
		g.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), name)
	n, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		g.Fatal(err)
	}
	return n
}

// descriptors is how many guestd has open or, for those who may not look, the
// size of its table of them, which grows with them.
func (g *guest) descriptors() int {
	g.Helper()
	if entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", g.cmd.Process.Pid)); err == nil {
		return len(entries)
	}
	return g.status("FDSize:")
}

func (g *guest) children() []process {
	g.Helper()
	all, err := processTable()
	if err != nil {
		g.Fatal(err)
	}
	var children []process
	for _, p := range all {
		if p.parent == g.cmd.Process.Pid {
			children = append(children, p)
		}
	}
	return children
}

func TestNothingRunsBeforeConfigure(t *testing.T) {
	t.Parallel()
	g := boot(t, nil, "echo", "started")
	if phase := g.hello().GetPhase(); phase != guestv1.Greeting_PHASE_WAITING {
		t.Errorf("phase %v", phase)
	}
	g.refused(guestv1.Failure_CODE_STATE, execRequest(&guestv1.Exec{Command: []string{"true"}}))
	g.refused(guestv1.Failure_CODE_STATE, &guestv1.Request{Call: &guestv1.Request_UpdateSecrets{UpdateSecrets: &guestv1.UpdateSecrets{}}})
	if n := len(g.children()); n != 0 {
		t.Errorf("%d children", n)
	}
	g.configure(&guestv1.Configure{Generation: 3})
	if code := g.exits(); code != 0 || g.stdout.String() != "started\n" || g.stderr.String() != "" {
		t.Errorf("exit %d, %q, %q", code, g.stdout, g.stderr)
	}
}

func TestHelloTellsWhatIsKnown(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	greeting := g.hello()
	if greeting.GetPhase() != guestv1.Greeting_PHASE_RUNNING || greeting.GetGeneration() != 1 || greeting.GetVersion() == "" {
		t.Errorf("%v", greeting)
	}
	fields := (&guestv1.Request{}).ProtoReflect().Descriptor().Oneofs().Get(0).Fields()
	known := map[string]bool{}
	for i := range fields.Len() {
		known[string(fields.Get(i).Name())] = true
	}
	for _, call := range greeting.GetCalls() {
		if !known[call] {
			t.Errorf("%s is no call", call)
		}
	}
}

func TestTermWhileWaitingEnds(t *testing.T) {
	t.Parallel()
	for number, want := range map[syscall.Signal]int{unix.SIGTERM: 143, unix.SIGINT: 130, 37: 165} {
		g := boot(t, nil, sleeper()...)
		g.hello()
		_ = g.cmd.Process.Signal(unix.SIGUSR1)
		_ = g.cmd.Process.Signal(number)
		if code := g.exits(); code != want {
			t.Errorf("exit %d, want %d", code, want)
		}
	}
}

func TestExitCodeIsTheWorkloads(t *testing.T) {
	t.Parallel()
	for script, want := range map[string]int{"exit 0": 0, "exit 42": 42, "kill -9 $$": 137, "kill -TERM $$": 143} {
		g := configured(t, "sh", "-c", script)
		if code := g.exits(); code != want {
			t.Errorf("%s: exit %d, want %d", script, code, want)
		}
	}
}

func TestCommandOfConfigureReplacesDefault(t *testing.T) {
	t.Parallel()
	g := boot(t, nil, "echo", "default")
	g.configure(&guestv1.Configure{Command: []string{"sh", "-c", `echo "$0 $X"`, "other"}, Env: map[string]string{"X": "set"}})
	if code := g.exits(); code != 0 || g.stdout.String() != "other set\n" {
		t.Errorf("exit %d, %q", code, g.stdout)
	}
}

func TestWorkloadThatCannotStartEndsGuestd(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		command []string
		code    guestv1.Failure_Code
		exit    int
	}{
		{[]string{"no-such-program"}, guestv1.Failure_CODE_NOT_FOUND, 127},
		{[]string{"/etc/passwd"}, guestv1.Failure_CODE_DENIED, 126},
		{nil, guestv1.Failure_CODE_INVALID, 126},
	} {
		g := boot(t, nil, test.command...)
		g.refused(test.code, configureRequest(&guestv1.Configure{}))
		if code := g.exits(); code != test.exit {
			t.Errorf("%v: exit %d, want %d", test.command, code, test.exit)
		}
		if text := g.stderr.String(); !strings.HasPrefix(text, "guestd: start the workload: ") || strings.Count(text, "\n") != 1 {
			t.Errorf("printed %q", text)
		}
	}
}

func TestConfigureStartsOnce(t *testing.T) {
	t.Parallel()
	g := boot(t, nil, sleeper()...)
	pids := make([]int, 20)
	var all sync.WaitGroup
	for i := range pids {
		all.Go(func() { pids[i] = g.configure(&guestv1.Configure{Generation: 5}) })
	}
	all.Wait()
	for _, pid := range pids {
		if pid == 0 || pid != pids[0] {
			t.Fatalf("pids %v", pids)
		}
	}
	if n := len(g.children()); n != 1 {
		t.Errorf("%d children", n)
	}
	text := g.refused(guestv1.Failure_CODE_STATE, configureRequest(&guestv1.Configure{Generation: 6}))
	if !strings.Contains(text, "5") {
		t.Errorf("%q does not say which", text)
	}
}

func TestSignalsReachTheWorkload(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	script := "for s in HUP INT QUIT USR1 USR2 WINCH CONT; do trap \"echo $s\" $s; done; trap 'echo TERM; exit 3' TERM; echo ready; while :; do sleep 0.02; done"
	g := boot(t, func(cmd *exec.Cmd) { cmd.Stdout = w }, "sh", "-c", script)
	w.Close()
	g.configure(&guestv1.Configure{})
	line := lines(t, r)
	if got := line(); got != "ready" {
		t.Fatal(got)
	}
	for name, number := range map[string]syscall.Signal{
		"HUP": unix.SIGHUP, "INT": unix.SIGINT, "QUIT": unix.SIGQUIT, "USR1": unix.SIGUSR1,
		"USR2": unix.SIGUSR2, "WINCH": unix.SIGWINCH, "CONT": unix.SIGCONT,
	} {
		if err := g.cmd.Process.Signal(number); err != nil {
			t.Fatal(err)
		}
		if got := line(); got != name {
			t.Errorf("got %s, want %s", got, name)
		}
	}
	_ = g.cmd.Process.Signal(unix.SIGTERM)
	if code := g.exits(); code != 3 {
		t.Errorf("exit %d", code)
	}
}

// lines returns what reads a line at a time.
func lines(t testing.TB, r *os.File) func() string {
	t.Helper()
	return func() string {
		_ = r.SetReadDeadline(time.Now().Add(limit))
		var line []byte
		for b := make([]byte, 1); ; {
			if _, err := r.Read(b); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			if b[0] == '\n' {
				return string(line)
			}
			line = append(line, b[0])
		}
	}
}

// A signal that comes while guestd is on its way out is too late to change how
// the workload ended.
func TestSignalsInTheEndChangeNoExitCode(t *testing.T) {
	t.Parallel()
	for range 20 {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		g := boot(t, func(cmd *exec.Cmd) { cmd.Stdout = w }, "sh", "-c", "trap '' TERM; echo ready; sleep 0.02")
		w.Close()
		g.configure(&guestv1.Configure{})
		if got := lines(t, r)(); got != "ready" {
			t.Fatal(got)
		}
		for len(g.code) == 0 {
			_ = g.cmd.Process.Signal(unix.SIGTERM)
		}
		if code := g.exits(); code != 0 {
			t.Fatalf("exit %d, want 0", code)
		}
	}
}

func TestStopIsPromptAndKillsWhatIsLeft(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	// A daemon that leaves its session, and one that ignores all.
	out := g.output(&guestv1.Exec{Command: []string{"sh", "-c", "setsid sh -c 'sleep 600 & echo $!; wait' >/dev/null & (trap '' TERM HUP; exec sleep 601) >/dev/null 2>&1 & echo $!"}})
	ignorer, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil || !alive(ignorer) {
		t.Fatalf("%q", out)
	}
	all, err := processTable()
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	_ = g.cmd.Process.Signal(unix.SIGTERM)
	if code := g.exits(); code != 143 {
		t.Errorf("exit %d", code)
	}
	t.Logf("stopped in %v", time.Since(begin))
	for pid := range descendants(all, g.cmd.Process.Pid) {
		if alive(pid) {
			t.Errorf("process %d lives on", pid)
		}
	}
}

func TestKilledGuestdTakesItsChildrenAlong(t *testing.T) {
	t.Parallel()
	g := boot(t, nil, "sh", "-c", "trap '' TERM; while :; do sleep 1; done")
	pid := g.configure(&guestv1.Configure{})
	s := g.shell("trap '' TERM HUP; echo ready; while :; do sleep 1; done")
	s.await("ready")
	_ = g.cmd.Process.Kill()
	g.exits()
	for _, pid := range []int{pid, s.pid} {
		g.eventually("child "+itoa(pid)+" is gone", func() bool { return !alive(pid) })
	}
}

func TestOrphansAreReaped(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	for range 50 {
		out := g.output(&guestv1.Exec{Command: []string{"sh", "-c", "(exec >/dev/null 2>&1; sleep 0.05) & echo $!"}})
		pid, err := strconv.Atoi(strings.TrimSpace(out))
		if err != nil {
			t.Fatal(err)
		}
		g.eventually("the orphan was reaped", func() bool { return !exists(pid) })
	}
	if n := len(g.children()); n != 1 {
		t.Errorf("%d children", n)
	}
}

func TestProcessOne(t *testing.T) {
	t.Parallel()
	g := boot(t, requireNamespaces(t), sleeper()...)
	pid := g.configure(&guestv1.Configure{Hostname: "never-the-hosts", Secrets: []*guestv1.Secret{{Name: "S", Value: []byte("canary-in-memory")}}})
	if pid <= 1 || pid > 100 {
		t.Errorf("the workload is process %d of its namespace", pid)
	}
	if name, err := os.Hostname(); err != nil || name == "never-the-hosts" {
		t.Fatalf("the host's name is %s, %v", name, err)
	}
	// Its namespace has the /proc of another; the processes see their own pid.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	stdout, _, exit := g.start(&guestv1.Exec{Command: []string{self, intruderFlag, g.socket}}).rest()
	if exit.GetCode() != 0 {
		t.Errorf("a process of the sandbox: %v, %s", exit, stdout)
	}
	for range 50 {
		g.output(&guestv1.Exec{Command: []string{"sh", "-c", "(exec >/dev/null 2>&1; sleep 0.02) & :"}})
	}
	g.eventually("orphans are reaped", func() bool { return len(g.children()) == 1 })
	text := g.refused(guestv1.Failure_CODE_DENIED, execRequest(&guestv1.Exec{Command: []string{"true"}, User: "0:0"}))
	if !strings.Contains(text, "cap_add: [SETUID, SETGID]") {
		t.Errorf("%q does not say what to do", text)
	}
	g.output(&guestv1.Exec{Command: []string{"true"}, User: "1000:1000"})
	all, err := processTable()
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	_ = g.cmd.Process.Signal(unix.SIGTERM)
	if code := g.exits(); code != 143 {
		t.Errorf("exit %d", code)
	}
	t.Logf("stopped in %v", time.Since(begin))
	for pid := range descendants(all, g.cmd.Process.Pid) {
		if alive(pid) {
			t.Errorf("process %d lives on", pid)
		}
	}
}

func TestMemoryIsNotReadableBySandbox(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	if os.Getuid() == 0 {
		// Root may look anywhere; the flag is what keeps others out.
		info, err := os.Stat(fmt.Sprintf("/proc/%d/environ", g.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		if stat, ok := info.Sys().(*syscall.Stat_t); !ok || stat.Uid != 0 {
			t.Error("owned by its user")
		}
	}
	for _, file := range []string{"environ", "mem", "maps"} {
		script := fmt.Sprintf("cat /proc/%d/%s", g.cmd.Process.Pid, file)
		c := &guestv1.Exec{Command: []string{"sh", "-c", script}, NoInput: true}
		if os.Getuid() == 0 {
			c.User = "65534:65534"
		}
		if _, _, exit := g.start(c).rest(); exit.GetCode() == 0 {
			t.Errorf("%s can be read", file)
		}
	}
	if out := g.output(&guestv1.Exec{Command: []string{"sh", "-c", "ulimit -c; ulimit -Hc"}}); out != "0\n0\n" {
		t.Errorf("limits of core dumps are %q", out)
	}
}

func TestAnotherUser(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	if os.Getuid() != 0 {
		// Who may is tested in internal/container, in a container that may.
		said := g.refused(guestv1.Failure_CODE_DENIED, &guestv1.Request{Call: &guestv1.Request_Exec{
			Exec: &guestv1.Exec{Command: []string{"true"}, User: "65534:65533"},
		}})
		if !strings.Contains(said, "SETUID") {
			t.Errorf("what would help is not in %q", said)
		}
		return
	}
	for user, want := range map[string]string{
		"65534:65533": "65534 65533 65533",
		"4242":        "4242 0 0",
		"root":        "0 0 0",
	} {
		out := g.output(&guestv1.Exec{Command: []string{"sh", "-c", "echo $(id -u) $(id -g) $(id -G)"}, User: user})
		if strings.TrimSpace(out) != want {
			t.Errorf("%s: %q, want %q", user, out, want)
		}
	}
	if out := g.output(&guestv1.Exec{Command: []string{"sh", "-c", "tty && echo x >$(tty) && echo home=$HOME"}, User: "4242", Tty: true}); !strings.Contains(out, "home=/\r\n") {
		t.Errorf("printed %q", out)
	}
}

func TestConfigureIsAnsweredOfWorkloadThatEndsAtOnce(t *testing.T) {
	t.Parallel()
	for range 50 {
		g := boot(t, nil, "true")
		if pid := g.configure(&guestv1.Configure{}); pid == 0 {
			t.Fatal("no pid")
		}
		if code := g.exits(); code != 0 {
			t.Fatalf("exit %d", code)
		}
	}
}
