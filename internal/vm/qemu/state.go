//go:build linux

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"filippo.io/age"

	"github.com/choiros/agent/internal/vm"
)

// unplugTimeout is how long a guest may take to let go of a device.
const unplugTimeout = 10 * time.Second

// pollInterval is how often a migration's progress is asked for.
const pollInterval = 10 * time.Millisecond

func (m *machine) Pause(ctx context.Context) error {
	m.changing.Lock()
	defer m.changing.Unlock()
	mon, err := m.running()
	if err != nil {
		return err
	}
	m.paused = true // even if QEMU is late to say so
	return mon.run(ctx, "stop", nil, nil)
}

func (m *machine) Resume(ctx context.Context) error {
	m.changing.Lock()
	defer m.changing.Unlock()
	mon, err := m.running()
	if err != nil {
		return err
	}
	if err := m.plugVsock(ctx); err != nil {
		return err
	}
	m.paused = false
	return mon.run(ctx, "cont", nil, nil)
}

// Save has QEMU migrate the machine into a pipe, from which what comes is sealed
// on its way to the file: none of it is on a disk as it is. A device in another process
// has a state that QEMU does not know, so a machine with shares is refused, and
// package vhost's is unplugged meanwhile: the guest, which must let go of it,
// runs for a moment, and finds its connections broken and its listeners as they were.
func (m *machine) Save(ctx context.Context, path string) (key []byte, err error) {
	m.changing.Lock()
	defer m.changing.Unlock()
	mon, err := m.running()
	if err != nil {
		return nil, err
	}
	if len(m.plan.config.Shares) > 0 {
		return nil, fmt.Errorf("%w: it has shares", vm.ErrCannotSave)
	}
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, err
	}
	var status struct {
		Running bool `json:"running"`
	}
	if err := mon.run(ctx, "query-status", nil, &status); err != nil {
		return nil, err
	}
	if status.Running {
		return nil, fmt.Errorf("%w: it is not paused", vm.ErrCannotSave)
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err = m.unplugVsock(ctx); err == nil {
		err = m.migrate(ctx, func(state *os.File) error { return seal(file, state, identity) })
	}
	err = errors.Join(err, file.Close())
	if err != nil {
		err = errors.Join(err, os.Remove(path))
	}
	if err = errors.Join(err, m.plugVsock(context.WithoutCancel(ctx))); err != nil {
		return nil, err
	}
	return []byte(identity.String()), nil
}

// object is QMP's word for a set of arguments.
type object map[string]any

// statePipe is what a pipe to or from QEMU is called in QMP.
const statePipe = "state"

// throughPipe is that pipe as a migration's other end.
func throughPipe() object {
	return object{"channels": []object{{
		"channel-type": "main", "addr": object{"transport": "socket", "type": "fd", "str": statePipe},
	}}}
}

// openPipe passes QEMU one end of a pipe, for reading or for writing, and
// returns the other.
func (m *machine) openPipe(ctx context.Context, qemuReads bool) (*os.File, error) {
	theirs, ours, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	if !qemuReads {
		theirs, ours = ours, theirs
	}
	defer theirs.Close()
	if err := m.mon.pass(ctx, statePipe, theirs); err != nil {
		ours.Close()
		return nil, err
	}
	return ours, nil
}

// migrate has QEMU write the machine's state into a pipe. take reads it to the
// end.
func (m *machine) migrate(ctx context.Context, take func(*os.File) error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	// A command is over soon. What it has begun is to be known.
	lasting := context.WithoutCancel(ctx)
	// As fast as the disk is: nothing else waits for it.
	if err := m.mon.run(lasting, "migrate-set-parameters", object{"max-bandwidth": 1 << 40}, nil); err != nil {
		return err
	}
	pipe, err := m.openPipe(lasting, false)
	if err != nil {
		return err
	}
	taken := carry(pipe, take)
	if err = m.mon.run(lasting, "migrate", throughPipe(), nil); err != nil {
		if refusal, ok := errors.AsType[*commandError](err); ok {
			err = fmt.Errorf("%w: %w", vm.ErrCannotSave, refusal)
		}
		_ = m.mon.run(lasting, "closefd", object{"fdname": statePipe}, nil) // it may have it no more
	} else if err = m.migrated(ctx); err != nil && ctx.Err() != nil {
		// Or it would refuse to resume.
		err = errors.Join(err, m.cancelMigration(lasting))
	}
	return errors.Join(err, taken.wait())
}

func (m *machine) cancelMigration(ctx context.Context) error {
	if err := m.mon.run(ctx, "migrate_cancel", nil, nil); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	if err := m.migrated(ctx); ctx.Err() != nil {
		return err
	}
	return nil
}

// migrated waits until a migration, in or out, is over.
func (m *machine) migrated(ctx context.Context) error {
	for {
		var now struct {
			Status string `json:"status"`
			Error  string `json:"error-desc"`
		}
		if err := m.mon.run(ctx, "query-migrate", nil, &now); err != nil {
			return err
		}
		switch now.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fmt.Errorf("%w: migration %s: %s", vm.ErrCannotSave, now.Status, now.Error)
		}
		select {
		case <-time.After(pollInterval):
		case <-m.mon.ended:
			return m.mon.why()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// restore reads the state back into a QEMU that has just started.
func (m *machine) restore(ctx context.Context) error {
	path, key := inDir(m.plan.config, m.plan.config.Restore), m.plan.config.RestoreKey
	pipe, err := m.openPipe(ctx, true)
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	// A QEMU that is given nothing waits for ever.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	given := carry(pipe, func(pipe *os.File) error {
		err := unseal(pipe, path, key)
		if err != nil {
			cancel(err)
		}
		return err
	})
	if err = m.mon.run(ctx, "migrate-incoming", throughPipe(), nil); err == nil {
		err = m.migrated(ctx)
	}
	if err == nil {
		if err = given.wait(); err == nil {
			err = m.plugVsock(ctx)
		}
		return err
	}
	if errors.Is(err, errMonitorClosed) {
		// It ends when it cannot read a state, and says why as it does so.
		select {
		case <-m.done:
			err = m.err
		case <-time.After(farewell):
		}
		err = fmt.Errorf("%w: %w", vm.ErrCannotSave, err)
	}
	_ = pipe.Close() // nobody reads it to its end
	_ = given.wait() // its error, if any, is err
	return fmt.Errorf("restore: %w", err)
}

// unplugVsock takes the device away, with a paused guest's help. It is done
// with what it has begun even if ctx ends: the guest would let go all the same.
func (m *machine) unplugVsock(ctx context.Context) error {
	if m.plan.vsock != vsockUser {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	gone := make(chan struct{})
	m.mu.Lock()
	plugged := m.plugged
	if plugged {
		m.unplugged = gone
	}
	m.mu.Unlock()
	if !plugged {
		return nil
	}
	err := m.mon.run(ctx, "device_del", object{"id": vsockDevice}, nil)
	if err == nil {
		err = m.mon.run(ctx, "cont", nil, nil)
	}
	if err == nil {
		select {
		case <-gone:
		case <-m.mon.ended:
			err = m.mon.why()
		case <-time.After(unplugTimeout):
			err = fmt.Errorf("%w: the guest does not let go of its vsock device in %v", vm.ErrCannotSave, unplugTimeout)
		}
	}
	// Paused it was, and paused it is to be, whatever became of it.
	return errors.Join(err, m.mon.run(ctx, "stop", nil, nil))
}

// plugVsock brings the device back, if it is not there.
func (m *machine) plugVsock(ctx context.Context) error {
	m.mu.Lock()
	plugged := m.plugged
	m.mu.Unlock()
	if plugged || m.plan.vsock != vsockUser {
		return nil
	}
	// That of the device which was there before, if one was.
	err := m.mon.run(ctx, "chardev-remove", object{"id": vsockChardev}, nil)
	if _, refused := errors.AsType[*commandError](err); err != nil && !refused {
		return err
	}
	conn, err := m.serveVsock()
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := m.mon.pass(ctx, vsockChardev, conn); err != nil {
		return err
	}
	err = m.mon.run(ctx, "chardev-add", object{"id": vsockChardev, "backend": object{
		"type": "socket",
		"data": object{"server": false, "addr": object{"type": "fd", "data": object{"str": vsockChardev}}},
	}}, nil)
	if err != nil {
		return err
	}
	err = m.mon.run(ctx, "device_add", object{
		"driver": "vhost-user-vsock-pci", "id": vsockDevice, "chardev": vsockChardev, "bus": vsockPort,
	}, nil)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.plugged = true
	m.mu.Unlock()
	return nil
}
