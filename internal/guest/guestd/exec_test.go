//go:build linux

package guestd

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

func itoa(n int) string { return strconv.Itoa(n) }

func TestExecKeepsStreamsApartAndTellsTheExit(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	for _, test := range []struct {
		script       string
		stdout, errs string
		code, signal int32
	}{
		{"echo out; echo err >&2", "out\n", "err\n", 0, 0},
		{"exit 7", "", "", 7, 0},
		{"exit 255", "", "", 255, 0},
		{"kill -KILL $$", "", "", 137, 9},
		{"kill -TERM $$", "", "", 143, 15},
		{"printf 'a\\000b'", "a\x00b", "", 0, 0},
		{"exec >&- 2>&-; exit 3", "", "", 3, 0},
	} {
		stdout, stderr, exit := g.shell(test.script).rest()
		if stdout != test.stdout || stderr != test.errs || exit.GetCode() != test.code || exit.GetSignal() != test.signal {
			t.Errorf("%s: %q, %q, %v; want %+v", test.script, stdout, stderr, exit, test)
		}
	}
}

func TestExecKeepsOrderWithinStream(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	stdout, _, _ := g.shell("i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); done").rest()
	var want strings.Builder
	for i := range 3000 {
		fmt.Fprintln(&want, i)
	}
	if stdout != want.String() {
		t.Errorf("%d bytes, not the numbers in their order", len(stdout))
	}
}

func TestExecTakesEnvironmentAndDir(t *testing.T) {
	t.Parallel()
	g := boot(t, nil, sleeper()...)
	g.configure(&guestv1.Configure{
		Generation: 1, Env: map[string]string{"A": "configured", "B": "configured"},
		Secrets: []*guestv1.Secret{{Name: "B", Value: []byte("secret \xff\n=odd")}},
	})
	out := g.output(&guestv1.Exec{
		Command: []string{"sh", "-c", `printf %s "$A|$B|$C|"; pwd`}, WorkingDir: "/usr",
		Env: map[string]string{"A": "exec's", "C": " \"'$(x)\té"},
	})
	if want := "exec's|secret \xff\n=odd| \"'$(x)\té|/usr\n"; out != want {
		t.Errorf("%q, want %q", out, want)
	}
}

func TestExecThatCannotStartFails(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"plain": 0o644, "noformat": 0o755} {
		if err := os.WriteFile(dir+"/"+name, []byte("\x00\x01\x02"), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(dir+"/nointerpreter", []byte("#!/nowhere/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		exec *guestv1.Exec
		code guestv1.Failure_Code
		text string
	}{
		{&guestv1.Exec{}, guestv1.Failure_CODE_INVALID, "command"},
		{&guestv1.Exec{Command: []string{"no-such-program"}}, guestv1.Failure_CODE_NOT_FOUND, "no-such-program"},
		{&guestv1.Exec{Command: []string{"/no/such"}}, guestv1.Failure_CODE_NOT_FOUND, "/no/such"},
		{&guestv1.Exec{Command: []string{dir + "/plain"}}, guestv1.Failure_CODE_DENIED, "plain"},
		{&guestv1.Exec{Command: []string{"plain"}, Env: map[string]string{"PATH": dir}}, guestv1.Failure_CODE_DENIED, "plain"},
		{&guestv1.Exec{Command: []string{dir + "/noformat"}}, guestv1.Failure_CODE_DENIED, "noformat"},
		{&guestv1.Exec{Command: []string{dir + "/nointerpreter"}}, guestv1.Failure_CODE_NOT_FOUND, "nointerpreter"},
		{&guestv1.Exec{Command: []string{"/"}}, guestv1.Failure_CODE_DENIED, "/"},
		{&guestv1.Exec{Command: []string{"true"}, WorkingDir: "/no/dir"}, guestv1.Failure_CODE_NOT_FOUND, "/no/dir"},
		{&guestv1.Exec{Command: []string{"true"}, Env: map[string]string{"A=B": "c"}}, guestv1.Failure_CODE_INVALID, "A=B"},
		{&guestv1.Exec{Command: []string{"true", "a\x00b"}}, guestv1.Failure_CODE_INVALID, "zero"},
		{&guestv1.Exec{Command: []string{"true"}, User: "nobody-there"}, guestv1.Failure_CODE_NOT_FOUND, "nobody-there"},
		{&guestv1.Exec{Command: []string{"true", strings.Repeat("x", 4<<20)}}, guestv1.Failure_CODE_INVALID, "true"},
	} {
		if text := g.refused(test.code, execRequest(test.exec)); !strings.Contains(text, test.text) {
			t.Errorf("%q does not say %q", text, test.text)
		}
	}
	if execs := g.execs(); len(execs) != 0 {
		t.Errorf("execs that never started are listed: %v", execs)
	}
}

func TestExecCarriesInput(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	const size = 100 << 20
	s := g.start(&guestv1.Exec{Command: []string{"wc", "-c"}})
	var sender sync.WaitGroup
	sender.Go(func() {
		chunk := bytes.Repeat([]byte("x"), wire.ChunkSize)
		for range size / len(chunk) {
			if s.SendData(wire.KindData, chunk) != nil {
				return
			}
		}
		_ = s.SendData(wire.KindData, nil)
	})
	stdout, _, exit := s.rest()
	sender.Wait()
	if strings.TrimSpace(stdout) != itoa(size) || exit.GetCode() != 0 {
		t.Errorf("%q, %v; want %d bytes counted", stdout, exit, size)
	}
	if out := g.output(&guestv1.Exec{Command: []string{"cat"}, NoInput: true}); out != "" {
		t.Errorf("without input cat printed %q", out)
	}
}

func TestExecInputThatNobodyReadsIsDropped(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	s := g.shell("exec <&-; echo closed; read x <&2; exit 4")
	s.await("closed")
	for range 4 {
		s.write(strings.Repeat("x", wire.ChunkSize))
	}
	s.say(&guestv1.ExecInput{Input: &guestv1.ExecInput_Signal{Signal: 15}})
	if _, _, exit := s.rest(); exit.GetCode() != 143 && exit.GetCode() != 4 && exit.GetCode() != 1 && exit.GetCode() != 2 {
		t.Errorf("%v", exit)
	}
}

func TestExecSlowReaderHoldsTheCommandBack(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	progress := t.TempDir() + "/progress"
	const mib = 64
	s := g.shell("i=0; while [ $i -lt " + itoa(mib) + " ]; do head -c 1048576 /dev/zero; i=$((i+1)); echo $i > " + progress + "; done")
	// It gets on by what the socket and the pipe hold, and not further.
	var at string
	same := 0
	g.eventually("it is held back", func() bool {
		now, _ := os.ReadFile(progress)
		if same++; string(now) != at {
			at, same = string(now), 0
		}
		return same > 100
	})
	if n, _ := strconv.Atoi(strings.TrimSpace(at)); n > mib/4 {
		t.Errorf("%d MiB were taken of a reader that reads nothing", n)
	}
	if rss := g.memoryKiB(); rss > 40<<10 {
		t.Errorf("guestd has %d KiB", rss)
	}
	stdout, _, exit := s.rest()
	if len(stdout) != mib<<20 || exit.GetCode() != 0 {
		t.Errorf("%d bytes, %v", len(stdout), exit)
	}
}

func TestExecDoesNotWaitForWhoHoldsItsPipes(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	begin := time.Now()
	stdout, _, exit := g.shell("sleep 60 & echo $!").rest()
	if took := time.Since(begin); took > 5*time.Second || exit.GetCode() != 0 {
		t.Errorf("%v after %v", exit, took)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(stdout))
	if err != nil || !alive(pid) {
		t.Errorf("what it left to run does not: %q", stdout)
	}
	begin = time.Now()
	stdout, _, exit = g.shell("yes & echo").rest()
	if took := time.Since(begin); took > 10*time.Second || exit.GetCode() != 0 || len(stdout) == 0 {
		t.Errorf("%v, %d bytes after %v", exit, len(stdout), took)
	}
	// What comes a little later is not lost. On a busy host it may come too late.
	g.eventually("last words are heard", func() bool {
		stdout, _, _ := g.shell("(sleep 0.03; echo late) &").rest()
		return stdout == "late\n"
	})
}

func TestExecOfDeadClientIsKilledWithItsChildren(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	for name, test := range map[string]struct {
		script string
		tty    bool
		input  int
	}{
		"simple":              {script: "echo $$; exec sleep 600"},
		"children":            {script: "sleep 600 & sh -c 'sleep 601' & echo $$ $!; wait"},
		"ignores":             {script: "trap '' HUP TERM; sleep 600 & echo $$ $!; while :; do sleep 1; done"},
		"groups of their own": {script: "set -m; sleep 600 & sleep 601 & echo $$ $!; wait", tty: true},
		"stopped":             {script: "echo $$; kill -STOP $$"},
		"full input":          {script: "echo $$; exec sleep 600", input: 1 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := g.start(&guestv1.Exec{Command: []string{"sh", "-c", test.script}, Tty: test.tty})
			printed := s.await("\n")
			if test.input > 0 {
				_ = s.NetConn().SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
				_ = s.SendData(wire.KindData, make([]byte, test.input))
			}
			s.Close()
			for _, text := range append(strings.Fields(printed), itoa(s.pid)) {
				pid, err := strconv.Atoi(text)
				if err != nil {
					t.Fatalf("printed %q", printed)
				}
				g.eventually("process "+text+" is gone, no zombie left", func() bool { return !exists(pid) })
			}
			g.eventually("it is not listed", func() bool {
				for _, e := range g.execs() {
					if e.GetId() == s.id {
						return false
					}
				}
				return true
			})
		})
	}
}

func TestExecKeptGoesOnAndIsAttachedTo(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	s := g.start(&guestv1.Exec{Command: []string{"sh", "-c", "echo one; read x; echo two $x; echo err >&2; read y; echo three $y; exit 5"}, Keep: true})
	s.await("one")
	s.Close()
	g.eventually("nobody is attached", func() bool { return len(g.execs()) == 1 && !g.execs()[0].GetAttached() })
	s = g.attach(s.id, false)
	s.write("a\n")
	s.await("err")
	s.say(&guestv1.ExecInput{Input: &guestv1.ExecInput_Detach{Detach: true}})
	s.Close()
	second := g.attach(s.id, false)
	second.write("b\n")
	stdout, _, exit := second.rest()
	if !strings.Contains(stdout, "three b") || exit.GetCode() != 5 {
		t.Errorf("%q, %v", stdout, exit)
	}
	g.eventually("it is forgotten", func() bool { return len(g.execs()) == 0 })
}

func TestExecEndedUnattachedIsKept(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	s := g.start(&guestv1.Exec{Command: []string{"sh", "-c", "read x; head -c 60000 /dev/zero | tr '\\0' a; echo end; echo err >&2; exit 9"}})
	s.say(&guestv1.ExecInput{Input: &guestv1.ExecInput_Detach{Detach: true}})
	s.Close()
	g.eventually("it is detached", func() bool { return !g.execs()[0].GetAttached() })
	s2 := g.attach(s.id, false)
	s2.write("go\n")
	s2.say(&guestv1.ExecInput{Input: &guestv1.ExecInput_Detach{Detach: true}})
	g.eventually("it ended", func() bool {
		execs := g.execs()
		return len(execs) == 0 || execs[0].GetExit() != nil
	})
	execs := g.execs()
	if len(execs) != 1 || execs[0].GetExit().GetCode() != 9 || execs[0].GetId() != s.id {
		t.Fatalf("listed: %v", execs)
	}
	g.refused(guestv1.Failure_CODE_STATE, signalRequest(s.id, 15))
	stdout, stderr, exit := g.attach(s.id, false).rest()
	if len(stdout) != 60004 || !strings.HasSuffix(stdout, "aend\n") || stderr != "err\n" || exit.GetCode() != 9 {
		t.Errorf("%d bytes, %q, %v", len(stdout), stderr, exit)
	}
	g.forgets()
	g.refused(guestv1.Failure_CODE_NOT_FOUND, &guestv1.Request{Call: &guestv1.Request_Attach{Attach: &guestv1.Attach{Id: s.id}}})
}

func TestExecsEndedAreKeptInBounds(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	var last string
	for range maxEnded + 10 {
		s := g.start(&guestv1.Exec{Command: []string{"sh", "-c", "read x"}, Keep: true})
		s.Close()
		last = s.id
	}
	g.eventually("they ended and the last is kept", func() bool {
		execs := g.execs()
		for _, e := range execs {
			if e.GetExit() == nil {
				// Its input is open as long as it lives.
				g.ask(signalRequest(e.GetId(), 9))
				return false
			}
		}
		return len(execs) == maxEnded && execs[len(execs)-1].GetId() == last
	})
}

func TestAttachTakesOver(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	first := g.shell("echo ready; read x; echo got $x")
	first.await("ready")
	second := g.attach(first.id, false)
	if _, _, err := first.Receive(); err == nil {
		t.Error("the first connection goes on")
	}
	second.write("it\n")
	if stdout, _, _ := second.rest(); stdout != "got it\n" {
		t.Errorf("printed %q", stdout)
	}
}

func TestAttachSkipsBacklog(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	s := g.start(&guestv1.Exec{Command: []string{"sh", "-c", "echo a; read x; echo b"}, Keep: true})
	s.await("a")
	s.Close()
	s = g.attach(s.id, true)
	s.write("\n")
	if stdout, _, _ := s.rest(); stdout != "b\n" {
		t.Errorf("printed %q", stdout)
	}
}

func signalRequest(id string, number int32) *guestv1.Request {
	return &guestv1.Request{Call: &guestv1.Request_SignalExec{SignalExec: &guestv1.SignalExec{Id: id, Signal: number}}}
}

func TestExecIsSignalled(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	s := g.shell("trap 'echo usr1' USR1; sleep 600 & echo ready; while :; do wait; done")
	s.await("ready")
	s.say(&guestv1.ExecInput{Input: &guestv1.ExecInput_Signal{Signal: 10}})
	s.await("usr1")
	g.tell(signalRequest(s.id, 9))
	if _, _, exit := s.rest(); exit.GetSignal() != 9 {
		t.Errorf("%v", exit)
	}
	g.forgets()
	g.refused(guestv1.Failure_CODE_NOT_FOUND, signalRequest(s.id, 9))
	s = g.start(&guestv1.Exec{Command: []string{"cat"}})
	g.refused(guestv1.Failure_CODE_INVALID, signalRequest(s.id, 65))
	g.refused(guestv1.Failure_CODE_INVALID, signalRequest(s.id, 0))
}

func TestExecWithTerminal(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	s := g.start(&guestv1.Exec{
		Command: []string{"sh", "-c", "trap 'stty size' WINCH; tty; stty size; echo ready >&2; echo on terminal >/dev/tty; cat; sleep 0.1; cat; echo $TERM"},
		Tty:     true, Size: &guestv1.TerminalSize{Columns: 81, Rows: 25},
	})
	out := s.await("on terminal")
	if !strings.Contains(out, "/dev/") || !strings.Contains(out, "25 81") || !strings.Contains(out, "ready") {
		t.Errorf("printed %q", out)
	}
	s.write("line\n")
	s.await("line\r\nline\r\n") // the echo, and cat's
	s.say(&guestv1.ExecInput{Input: &guestv1.ExecInput_Resize{Resize: &guestv1.TerminalSize{Columns: 100, Rows: 1 << 20}}})
	if err := s.SendData(wire.KindData, nil); err != nil {
		t.Fatal(err)
	}
	s.await("65535 100")
	second := g.attach(s.id, true)
	second.write("\x04") // the end, typed
	stdout, stderr, exit := second.rest()
	if stderr != "" || !strings.Contains(stdout, "\r\n") || exit.GetCode() != 0 {
		t.Errorf("%q, %q, %v", stdout, stderr, exit)
	}
}

func TestTerminalInterrupts(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	s := g.start(&guestv1.Exec{Command: []string{"sh", "-c", "echo ready; exec sleep 600"}, Tty: true})
	s.await("ready")
	s.write("\x03")
	if _, _, exit := s.rest(); exit.GetSignal() != 2 {
		t.Errorf("%v", exit)
	}
}

func TestExecsAreBounded(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	request := func() *guestv1.Request {
		return execRequest(&guestv1.Exec{Command: []string{"cat"}})
	}
	var sessions []*session
	for range maxExecs {
		sessions = append(sessions, g.session(request()))
	}
	g.refused(guestv1.Failure_CODE_EXHAUSTED, request())
	for _, s := range sessions {
		s.Close()
	}
	g.eventually("there is room again", func() bool { return len(g.execs()) == 0 })
	g.session(request())
}

func TestThousandsOfExecsLeaveNothing(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	one := func(i int) {
		c := &guestv1.Exec{Command: []string{"echo", itoa(i)}, Tty: i%10 == 9, NoInput: i%2 == 0, Keep: i%3 == 0}
		if out := strings.TrimSpace(g.output(c)); out != itoa(i) {
			t.Fatalf("exec %d printed %q", i, out)
		}
	}
	for i := range 500 {
		one(i)
	}
	idle := g.descriptors()
	before := g.memoryKiB()
	for i := range 2000 {
		one(i)
	}
	g.eventually("descriptors are as before", func() bool { return g.descriptors() <= idle })
	if after := g.memoryKiB(); !raced && after > before+4<<10 {
		t.Errorf("memory grew from %d to %d KiB", before, after)
	}
	if n := len(g.children()); n != 1 {
		t.Errorf("%d children are left beside the workload", n-1)
	}
	if execs := g.execs(); len(execs) != 0 {
		t.Errorf("listed: %v", execs)
	}
}

func BenchmarkExecTrue(b *testing.B) {
	g := configured(b, sleeper()...)
	for b.Loop() {
		if _, _, exit := g.start(&guestv1.Exec{Command: []string{"/bin/true"}, NoInput: true}).rest(); exit.GetCode() != 0 {
			b.Fatal(exit)
		}
	}
	b.ReportMetric(float64(g.memoryKiB()), "KiB-rss")
}
