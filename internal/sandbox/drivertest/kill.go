package drivertest

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// VerbCall is one call of a driver's, to be made by another process.
type VerbCall struct {
	Verb  string // create, start, stop or delete
	Ref   sandbox.Ref
	Spec  sandbox.Spec  // of create
	Grace time.Duration // of stop
}

// verbVariable holds what VerbMain is to do, as JSON.
const verbVariable = "DRIVERTEST_VERB"

type verbOrder struct {
	Config string
	Call   VerbCall
}

// VerbProcess returns a Harness.Kill. It runs the calling test binary once
// more, whose TestMain is to call VerbMain; config is what that hands to open.
func VerbProcess(config string) func(t *testing.T, call VerbCall, after time.Duration) bool {
	return func(t *testing.T, call VerbCall, after time.Duration) bool {
		t.Helper()
		order, err := json.Marshal(verbOrder{Config: config, Call: call})
		if err != nil {
			t.Fatal(err)
		}
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		var stderr strings.Builder
		cmd := exec.CommandContext(context.WithoutCancel(t.Context()), self)
		cmd.Env = append(os.Environ(), verbVariable+"="+string(order))
		cmd.Stderr = &stderr
		// What the verb starts may inherit stderr, and goes on.
		cmd.WaitDelay = time.Second
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		said := bufio.NewReader(stdout)
		if _, err := said.ReadString('\n'); err != nil {
			_ = cmd.Wait()
			t.Fatalf("the process that was to %s did not get there: %v\n%s", call.Verb, err, stderr.String())
		}
		timer := time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		rest, _ := io.ReadAll(said)
		timer.Stop()
		_ = cmd.Wait()
		if report, failed := strings.CutPrefix(string(rest), "error: "); failed {
			t.Fatalf("%s in a process of its own: %s", call.Verb, report)
		}
		return string(rest) == "done\n"
	}
}

// VerbMain takes over if this process was started by what VerbProcess returns,
// and exits; else it returns at once. Call it in TestMain.
func VerbMain(open func(config string) (sandbox.Driver, error)) {
	text, found := os.LookupEnv(verbVariable)
	if !found {
		return
	}
	// Whatever this process starts is not to be taken for this one.
	_ = os.Unsetenv(verbVariable)
	if err := runVerb(text, open); err != nil {
		fmt.Printf("error: %v\n", err)
		os.Exit(1)
	}
	fmt.Println("done")
	os.Exit(0)
}

func runVerb(text string, open func(config string) (sandbox.Driver, error)) error {
	var order verbOrder
	if err := json.Unmarshal([]byte(text), &order); err != nil {
		return err
	}
	d, err := open(order.Config)
	if err != nil {
		return err
	}
	fmt.Println("go")
	ctx, call := context.Background(), order.Call
	switch call.Verb {
	case "create":
		return d.Create(ctx, call.Ref, call.Spec)
	case "start":
		return d.Start(ctx, call.Ref)
	case "stop":
		return d.Stop(ctx, call.Ref, call.Grace)
	case "delete":
		return d.Delete(ctx, call.Ref)
	}
	return fmt.Errorf("there is no verb %q", call.Verb)
}

func killTests() []test {
	return []test{
		{"LifeAcrossProcesses", lifeAcrossProcesses},
		{"KilledInCreate", killedInCreate},
		{"KilledInStart", killedInStart},
		{"KilledInStop", killedInStop},
		{"KilledInDelete", killedInDelete},
	}
}

// lifeAcrossProcesses has each verb called by a process that ends after it.
func lifeAcrossProcesses(t *testing.T, s *suite) {
	b := s.box(t)
	call := func(verb string, want sandbox.State) sandbox.Observation {
		t.Helper()
		if !s.Kill(t, VerbCall{Verb: verb, Ref: b.ref, Spec: b.spec("sleep"), Grace: long}, s.Patience) {
			t.Fatalf("%s in a process of its own did not return within %s", verb, s.Patience)
		}
		return b.want(want)
	}
	call("create", sandbox.StateCreated)
	o := call("start", sandbox.StateRunning)
	b.configure()
	b.printed("ready")
	b.undisturbed(o)
	back := b.waiting()
	call("stop", sandbox.StateExited)
	if a := within(t, s.Patience, back, "Wait"); a.err != nil || a.value.ExitCode != 0 {
		t.Errorf("Wait for one that another process stops says %+v, %v; want exit code 0", a.value, a.err)
	}
	call("start", sandbox.StateRunning)
	call("delete", sandbox.StateAbsent)
	b.wantGone()
}

// killPoints runs f for moments spread over the time that a verb takes, which
// f measures when given a time that is not used up.
func (s *suite) killPoints(t *testing.T, f func(t *testing.T, after time.Duration)) {
	points := []int{0, 1, 2, 3, 4, 5, 6, 7}
	begun := time.Now()
	f(t, s.Patience)
	// The time of all the rest that f does is in this, too: so the points are
	// closer together at the beginning.
	whole := time.Since(begun)
	for _, i := range sample(s, points) {
		after := whole >> (len(points) - i)
		if i == 0 {
			after = 0
		}
		t.Run(fmt.Sprintf("point %d", i), func(t *testing.T) { f(t, after) })
	}
}

// consistent waits until Inspect and List agree on whether there is anything,
// which they may not while the backend goes on with what the dead had asked.
func (b *box) consistent() sandbox.State {
	b.t.Helper()
	var state sandbox.State
	b.s.eventually(b.t, "Inspect and List agree", func() bool {
		state = b.inspect().State
		return b.listed() == (state != sandbox.StateAbsent)
	})
	return state
}

func killedInCreate(t *testing.T, s *suite) {
	s.killPoints(t, func(t *testing.T, after time.Duration) {
		b := s.box(t)
		done := s.Kill(t, VerbCall{Verb: "create", Ref: b.ref, Spec: b.spec("exit", "3")}, after)
		switch state := b.consistent(); {
		case done && state != sandbox.StateCreated:
			t.Errorf("Create had succeeded, and it is %s", state)
		case state == sandbox.StateRunning || state == sandbox.StateExited:
			t.Errorf("Create was killed, and it is %s", state)
		}
		// Either Create completes it, or it is broken and Delete clears the way.
		if err := b.tryCreate(b.spec("exit", "3")); err != nil {
			if state := b.inspect().State; state != sandbox.StateBroken {
				t.Fatalf("Create of one that is %s: %v", state, err)
			}
			b.delete()
			b.create("exit", "3")
		}
		b.start()
		b.wait()
		b.exited(3)
	})
}

func killedInStart(t *testing.T, s *suite) {
	s.killPoints(t, func(t *testing.T, after time.Duration) {
		b := s.box(t)
		b.create("ready-after", "0s", "/data/ready")
		done := s.Kill(t, VerbCall{Verb: "start", Ref: b.ref}, after)
		switch state := b.consistent(); {
		case done && state != sandbox.StateRunning:
			t.Errorf("Start had succeeded, and it is %s", state)
		case state == sandbox.StateAbsent || state == sandbox.StateBroken:
			t.Fatalf("Start was killed, and it is %s", state)
		}
		b.start()
		b.want(sandbox.StateRunning)
		b.printed("ready")
		b.stop(long)
		b.exited(0)
	})
}

func killedInStop(t *testing.T, s *suite) {
	s.killPoints(t, func(t *testing.T, after time.Duration) {
		b := s.box(t)
		b.stubborn()
		done := s.Kill(t, VerbCall{Verb: "stop", Ref: b.ref, Grace: 200 * time.Millisecond}, after)
		switch state := b.consistent(); {
		case done && state != sandbox.StateExited:
			t.Errorf("Stop had succeeded, and it is %s", state)
		case state != sandbox.StateRunning && state != sandbox.StateExited:
			t.Errorf("Stop was killed, and it is %s", state)
		}
		b.stop(0)
		b.exited(137)
	})
}

func killedInDelete(t *testing.T, s *suite) {
	s.killPoints(t, func(t *testing.T, after time.Duration) {
		b := s.box(t)
		b.stubborn()
		done := s.Kill(t, VerbCall{Verb: "delete", Ref: b.ref}, after)
		if state := b.consistent(); done && state != sandbox.StateAbsent {
			t.Errorf("Delete had succeeded, and it is %s", state)
		}
		b.delete()
		b.wantGone()
	})
}
