package vz

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/choiros/agent/internal/vm"
)

func (m *machine) Pause(ctx context.Context) error {
	return m.halt(ctx, statePaused, m.vm.Pause)
}

func (m *machine) Resume(ctx context.Context) error {
	return m.halt(ctx, stateRunning, m.vm.Resume)
}

// halt brings the machine to a state by a call, unless it is there.
func (m *machine) halt(ctx context.Context, to state, call func() error) error {
	if err := m.running(); err != nil {
		return err
	}
	return m.change(ctx, func() error {
		if m.vm.State() == to {
			return nil
		}
		return said(call())
	}, nil)
}

// checkSavable is why no state of the machine can be saved, if none can.
func (m *machine) checkSavable(f framework) error {
	if err := checkSavedStates(f); err != nil {
		return fmt.Errorf("%w: %w", vm.ErrCannotSave, err)
	}
	supported, err := m.configuration.ValidateSaveRestoreSupport()
	if err != nil {
		return fmt.Errorf("%w: %w", vm.ErrCannotSave, said(err))
	}
	if !supported {
		return fmt.Errorf("%w: macOS cannot with these devices", vm.ErrCannotSave)
	}
	return nil
}

// Save has the framework write the state. It seals that with a key which never
// leaves the Mac, so none is returned.
func (m *machine) Save(ctx context.Context, path string) (key []byte, err error) {
	if err := m.running(); err != nil {
		return nil, err
	}
	if m.savable != nil {
		return nil, m.savable
	}
	path = absolute(path)
	return nil, m.change(ctx, func() error { return m.save(path) }, func() { _ = os.Remove(path) })
}

func (m *machine) save(path string) error {
	if m.vm.State() != statePaused {
		return fmt.Errorf("%w: it is not paused", vm.ErrCannotSave)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("save: %s: %w", path, errors.Join(err, fs.ErrExist))
	}
	err := m.vm.SaveMachineStateToPath(path)
	if err == nil {
		if err = settle(path); err == nil {
			return nil
		}
	}
	if removed := os.Remove(path); removed != nil && !errors.Is(removed, fs.ErrNotExist) {
		err = errors.Join(err, removed)
	}
	if hasCode(err, vzDomain, vzOutOfDiskSpace) {
		return fmt.Errorf("save: there is no space left on this Mac's disk: %w", said(err))
	}
	return fmt.Errorf("save: %w", said(err))
}

// settle makes a state private, and has it on the disk.
func settle(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(file.Chmod(0o600), file.Sync(), file.Close())
}
