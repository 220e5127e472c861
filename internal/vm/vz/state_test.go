package vz

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/choiros/agent/internal/vm"
)

// paused is a machine that is, and where its state is to go.
func paused(t *testing.T, s *standIn) (*machine, string) {
	t.Helper()
	m := boot(t, s)
	if err := m.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	return m, filepath.Join(t.TempDir(), "saved")
}

func TestSaveSealsByItself(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	m, path := paused(t, s)
	key, err := m.Save(t.Context(), path)
	if err != nil || len(key) != 0 {
		t.Fatalf("key %q, %v", key, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if s.machine.State() != statePaused {
		t.Errorf("state %d", s.machine.State())
	}
	if _, err = m.Save(t.Context(), path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a file: %v", err)
	}
	if err := m.Resume(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestWhatCannotBeSavedIsNotTried(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(*standIn)
		resume bool
		says   string
	}{
		"macOS 13":         {func(s *standIn) { s.version = "13.6" }, false, "macOS 14"},
		"what macOS says":  {func(s *standIn) { s.unsavable = refused("Directory sharing.") }, false, "Directory sharing."},
		"it is not paused": {func(*standIn) {}, true, "not paused"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStandIn()
			c.change(s)
			m, path := paused(t, s)
			if c.resume {
				if err := m.Resume(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			before := s.machine.record()
			_, err := m.Save(t.Context(), path)
			wantText(t, err, c.says)
			if !errors.Is(err, vm.ErrCannotSave) {
				t.Errorf("%v is not ErrCannotSave", err)
			}
			if _, err := os.Stat(path); err == nil || s.machine.record() != before {
				t.Errorf("it was tried: %s", s.machine.record())
			}
		})
	}
}

func TestSaveThatFailsLeavesNoFile(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		err  error
		says string
	}{
		"failed":   {&nsError{Domain: vzDomain, Code: 11, LocalizedDescription: "The save failed."}, "The save failed."},
		"no space": {&nsError{Domain: vzDomain, Code: vzOutOfDiskSpace}, "no space left"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStandIn()
			s.prepare = func(m *standInMachine) { m.saveErr = c.err }
			m, path := paused(t, s)
			_, err := m.Save(t.Context(), path)
			wantText(t, err, c.says)
			if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Error("there is a file")
			}
			if err := m.Resume(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSaveThatNobodyWaitsForLeavesNoFile(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	hold := make(chan struct{})
	s.prepare = func(m *standInMachine) { m.holdSave = hold }
	m, path := paused(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := m.Save(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	eventually(t, "the framework writes", func() bool {
		_, err := os.Stat(path)
		return err == nil
	})
	close(hold)
	eventually(t, "the file is gone", func() bool {
		_, err := os.Stat(path)
		return errors.Is(err, fs.ErrNotExist)
	})
	if err := m.Resume(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestKillWhileItSavesComesAfter(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	hold := make(chan struct{})
	s.prepare = func(m *standInMachine) { m.holdSave = hold }
	m, path := paused(t, s)
	saved, killed := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := m.Save(context.WithoutCancel(t.Context()), path)
		saved <- err
	}()
	eventually(t, "it saves", func() bool { return s.machine.State() == stateSaving })
	go func() { killed <- m.Kill() }()
	close(hold)
	if err := errors.Join(<-saved, <-killed); err != nil {
		t.Error(err)
	}
	if got := s.machine.record(); got != "start pause save stop" {
		t.Errorf("calls: %s", got)
	}
}

func TestRestoreGoesOnWithTheSameIdentifier(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	config, options := setup(t)
	first := made(t, s, config, options)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	config.Restore = "kernel" // any file
	m := made(t, s, config, options)
	if _, err := m.Listen(1025); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Whoever is called from inside listens before anything runs there.
	if got := s.machine.record(); got != "restore listen resume" || s.machine.State() != stateRunning {
		t.Errorf("calls: %s", got)
	}
	if a, b := s.blueprints[0], s.blueprints[1]; string(a.MachineIdentifier) != string(b.MachineIdentifier) {
		t.Errorf("%q was saved, and is restored by %q", a.MachineIdentifier, b.MachineIdentifier)
	}
}

func TestRestoreThatFailsEndsTheMachineAndLetsAnotherBoot(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(*standInMachine){
		"restore": func(m *standInMachine) {
			m.restoreErr = &nsError{Domain: vzDomain, Code: 12, LocalizedDescription: "invalid argument"}
		},
		"resume": func(m *standInMachine) { m.resumeErr = refused("") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStandIn()
			s.prepare = prepare
			config, options := setup(t)
			cold := config
			config.Restore = "kernel"
			m := made(t, s, config, options)
			err := m.Start(t.Context())
			if err == nil || name == "restore" && !errors.Is(err, vm.ErrCannotSave) {
				t.Fatal(err)
			}
			wantDone(t, m)
			s.prepare = nil
			if err := made(t, s, cold, options).Start(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}
