package vz

import (
	"bytes"
	"context"
	"errors"
	"os"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

func TestGuestThatSwitchesItselfOffHasEnded(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	m := boot(t, s)
	if s.machine.State() != stateRunning {
		t.Fatalf("started, and it is in state %d", s.machine.State())
	}
	if err := m.Start(t.Context()); !errors.Is(err, errStarted) {
		t.Errorf("a second start: %v", err)
	}
	s.machine.become(stateStopping)
	select {
	case <-m.Done():
		t.Fatal("it has ended before it stopped")
	default:
	}
	s.machine.become(stateStopped)
	wantDone(t, m)
	if err := m.Err(); err != nil {
		t.Error(err)
	}
	for what, err := range map[string]error{
		"start": m.Start(t.Context()), "pause": m.Pause(t.Context()), "press power": m.PressPower(t.Context()),
	} {
		if !errors.Is(err, errNotRunning) {
			t.Errorf("%s of a machine that has ended: %v", what, err)
		}
	}
	if err := errors.Join(m.Kill(), m.Close()); err != nil {
		t.Error(err)
	}
}

func TestMachineThatFailsSaysWhereMacOSSaysWhy(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	m := boot(t, s)
	s.machine.become(stateError)
	wantDone(t, m)
	wantText(t, m.Err(), "failed", "log show")
}

func TestEndReleasesAll(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	config, options := setup(t)
	network, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	config.Network, config.MAC = network, []byte{0x5a, 0, 0, 0, 0, 1}
	m := made(t, s, config, options)
	null := m.null
	if null == nil || s.blueprints[0].Console != null {
		t.Fatal("a console that nobody wants is not connected to nothing")
	}
	l, err := m.Listen(1025)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := m.Kill(); err != nil {
		t.Fatal(err)
	}
	wantDone(t, m)
	if m.Err() != nil || s.machine.State() != stateStopped || s.machine.record() != "start listen stop" {
		t.Errorf("%v, state %d, calls %s", m.Err(), s.machine.State(), s.machine.record())
	}
	if _, err := l.Accept(); err == nil || !s.machine.listener(1025).isClosed() {
		t.Errorf("its listener goes on: %v", err)
	}
	for _, file := range []*os.File{network, null} {
		if err := file.Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s is open", file.Name())
		}
	}
}

func TestMachineThatWasNeverStartedCanBeClosed(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	m := fresh(t, s)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	wantDone(t, m)
	if err := m.Start(t.Context()); !errors.Is(err, errNotRunning) || s.machine.record() != "" {
		t.Errorf("%v, calls %q", err, s.machine.record())
	}
}

func TestStartThatFailsSaysWhy(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		err  error
		lock bool
		says []string
	}{
		"internal":     {&nsError{Domain: vzDomain, Code: 1, LocalizedDescription: "Internal Virtualization error.\nThe virtual machine failed to start."}, false, []string{"The virtual machine failed to start. (VZErrorDomain 1)"}},
		"too many":     {&nsError{Domain: vzDomain, Code: vzLimitExceeded}, false, []string{"as many virtual machines as it can", "stop one"}},
		"no space":     {&nsError{Domain: vzDomain, Code: vzOutOfDiskSpace}, false, []string{"no space left", "make room"}},
		"a disk taken": {refused("The storage device attachment is invalid."), true, []string{"disk layer", "in use by another machine", "\n", "attachment is invalid"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStandIn()
			s.prepare = func(m *standInMachine) { m.startErr = c.err }
			config, options := setup(t)
			m := made(t, s, config, options)
			if c.lock { // by another that was started at the same time
				lock(t, config.Disks[1].Path)
			}
			wantText(t, m.Start(t.Context()), c.says...)
			wantDone(t, m)
		})
	}
}

// TestStartThatHangsIsCutOff is of a framework that does not answer, as where
// it waits for a disk, and that does so later: what it has started is stopped.
func TestStartThatHangsIsCutOff(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	hold := make(chan struct{})
	s.prepare = func(m *standInMachine) { m.holdStart = hold }
	m := fresh(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(time.Millisecond, cancel)
	started := make(chan error, 1)
	go func() { started <- m.Start(ctx) }()
	eventually(t, "it is being killed", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.stopping
	})
	close(hold)
	wantDone(t, m)
	if err := <-started; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if got := s.machine.record(); got != "start stop" {
		t.Errorf("calls: %s", got)
	}
}

func TestKillTriesAgainUntilItCan(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newStandIn()
		s.prepare = func(m *standInMachine) { m.unstoppable[stateRunning] = true }
		m := boot(t, s)
		begun := time.Now()
		wantText(t, m.Kill(), "not gone after 10s")
		if time.Since(begun) != killTimeout {
			t.Errorf("it took %v", time.Since(begun))
		}
		s.machine.become(statePaused) // where it can be stopped
		synctest.Wait()
		wantDone(t, m)
		if err := m.Err(); err != nil {
			t.Error(err)
		}
	})
}

func TestKillSaysWhyItCannot(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newStandIn()
		s.prepare = func(m *standInMachine) { m.stopErr = refused("It does not want to.") }
		m := boot(t, s)
		err := m.Kill()
		wantText(t, err, "not gone", "\n", "It does not want to.")
		s.machine.mu.Lock()
		s.machine.stopErr = nil
		s.machine.mu.Unlock()
		if err := m.Kill(); err != nil {
			t.Error(err)
		}
	})
}

func TestKillsAtTheSameTimeStopOnce(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	m := boot(t, s)
	killed := make(chan error)
	for range 8 {
		go func() { killed <- m.Kill() }()
	}
	for range 8 {
		if err := <-killed; err != nil {
			t.Error(err)
		}
	}
	if got := s.machine.record(); got != "start stop" {
		t.Errorf("calls: %s", got)
	}
}

func TestPowerButton(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	m := boot(t, s)
	if err := m.PressPower(t.Context()); err != nil {
		t.Error(err)
	}
	if err := m.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantText(t, m.PressPower(t.Context()), "paused")
	if got := s.machine.record(); got != "start request-stop pause" {
		t.Errorf("calls: %s", got)
	}
	if err := m.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.machine.deaf = true
	wantText(t, m.PressPower(t.Context()), "macOS did not")
}

func TestPauseAndResumeOfWhatIsSoAlready(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	m := boot(t, s)
	for range 2 {
		if err := m.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := m.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.machine.record(); got != "start pause resume" {
		t.Errorf("calls: %s", got)
	}
}

// TestCallsComeOneAfterTheOther: one that nobody waits for any more is over
// before the next.
func TestCallsComeOneAfterTheOther(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	hold := make(chan struct{})
	s.prepare = func(m *standInMachine) { m.holdPause = hold }
	m := boot(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := m.Pause(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("pause: %v", err)
	}
	if err := m.Resume(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("resume, meanwhile: %v", err)
	}
	resumed := make(chan error, 1)
	go func() { resumed <- m.Resume(t.Context()) }()
	close(hold)
	if err := <-resumed; err != nil {
		t.Fatal(err)
	}
	if got := s.machine.record(); got != "start pause resume" || s.machine.State() != stateRunning {
		t.Errorf("calls: %s", got)
	}
}

// TestNobodyWaitsForTheStatesOfAMachineThatHasEnded looks for goroutines.
func TestNobodyWaitsForTheStatesOfAMachineThatHasEnded(t *testing.T) {
	for name, end := range map[string]func(*machine, *standInMachine){
		"switched off": func(_ *machine, guest *standInMachine) { guest.become(stateStopped) },
		"killed":       func(m *machine, _ *standInMachine) { _ = m.Kill() },
	} {
		t.Run(name, func(t *testing.T) {
			s := newStandIn()
			m := boot(t, s)
			eventually(t, "somebody does, to begin with", func() bool { return waiting("(*machine).watch") == 1 })
			end(m, s.machine)
			wantDone(t, m)
			for _, function := range []string{"(*machine).watch", "(*machine).stop"} {
				eventually(t, function+" returns", func() bool { return waiting(function) == 0 })
			}
		})
	}
}

// waiting is how many goroutines are in a function of this package.
func waiting(function string) int {
	stacks := make([]byte, 1<<20)
	return bytes.Count(stacks[:runtime.Stack(stacks, true)], []byte("vm/vz."+function+"("))
}
