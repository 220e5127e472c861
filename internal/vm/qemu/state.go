//go:build linux

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

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
	return mon.run(ctx, "cont", nil, nil)
}

// Save has QEMU migrate the machine to a file. A device in another process
// has a state that QEMU does not know, so a machine with shares is refused, and
// vhost-device-vsock is unplugged meanwhile: the guest, which must let go of it,
// runs for a moment, and finds its connections broken and its listeners as they were.
func (m *machine) Save(ctx context.Context, path string) error {
	m.changing.Lock()
	defer m.changing.Unlock()
	mon, err := m.running()
	if err != nil {
		return err
	}
	if len(m.plan.config.Shares) > 0 {
		return fmt.Errorf("%w: it has shares", vm.ErrCannotSave)
	}
	if path, err = filepath.Abs(path); err != nil { // QEMU works elsewhere
		return err
	}
	var status struct {
		Running bool `json:"running"`
	}
	if err := mon.run(ctx, "query-status", nil, &status); err != nil {
		return err
	}
	if status.Running {
		return fmt.Errorf("%w: it is not paused", vm.ErrCannotSave)
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err = m.unplugVsock(ctx); err == nil {
		if err = m.migrate(ctx, path); err == nil {
			err = file.Sync()
		}
	}
	err = errors.Join(err, file.Close())
	if err != nil {
		err = errors.Join(err, os.Remove(path))
	}
	return errors.Join(err, m.plugVsock(context.WithoutCancel(ctx)))
}

// object is QMP's word for a set of arguments.
type object map[string]any

// useMappedRAM has migrations write each page at a place of its own, and none
// that is zero: the file has holes there, and is as long as the memory. QEMU
// knows it since 9.0.
func (m *machine) useMappedRAM(ctx context.Context) error {
	err := m.mon.run(ctx, "migrate-set-capabilities", object{
		"capabilities": []object{{"capability": "mapped-ram", "state": true}},
	}, nil)
	if refusal, ok := errors.AsType[*commandError](err); ok {
		return fmt.Errorf("%w: %w", vm.ErrCannotSave, refusal)
	}
	return err
}

// stateFile is a file as a migration's other end.
func stateFile(path string) object {
	return object{"channels": []object{{
		"channel-type": "main",
		"addr":         object{"transport": "file", "filename": path, "offset": 0},
	}}}
}

func (m *machine) migrate(ctx context.Context, path string) error {
	if err := m.useMappedRAM(ctx); err != nil {
		return err
	}
	// As fast as the disk is: nothing else waits for it.
	if err := m.mon.run(ctx, "migrate-set-parameters", object{"max-bandwidth": 1 << 40}, nil); err != nil {
		return err
	}
	if err := m.mon.run(ctx, "migrate", stateFile(path), nil); err != nil {
		if refusal, ok := errors.AsType[*commandError](err); ok {
			return fmt.Errorf("%w: %w", vm.ErrCannotSave, refusal)
		}
		return err
	}
	err := m.migrated(ctx)
	if err != nil && ctx.Err() != nil {
		// Or it would go on writing to a file that is gone, and refuse to resume.
		err = errors.Join(err, m.cancelMigration(context.WithoutCancel(ctx)))
	}
	return err
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
	path, err := filepath.Abs(inDir(m.plan.config, m.plan.config.Restore))
	if err != nil {
		return err
	}
	if err := m.useMappedRAM(ctx); err != nil {
		return err
	}
	if err = m.mon.run(ctx, "migrate-incoming", stateFile(path), nil); err == nil {
		err = m.migrated(ctx)
	}
	if errors.Is(err, errMonitorClosed) {
		// It ends when it cannot read a state, and says why as it does so.
		select {
		case <-m.done:
			err = m.err
		case <-time.After(farewell):
		}
		return fmt.Errorf("restore: %w: %w", vm.ErrCannotSave, err)
	}
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	return m.plugVsock(ctx)
}

// unplugVsock takes the device away, with a paused guest's help.
func (m *machine) unplugVsock(ctx context.Context) error {
	if m.plan.vsock != vsockUser {
		return nil
	}
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
		ctx, cancel := context.WithTimeout(ctx, unplugTimeout)
		defer cancel()
		select {
		case <-gone:
		case <-m.mon.ended:
			err = m.mon.why()
		case <-ctx.Done():
			err = fmt.Errorf("%w: the guest does not let go of its vsock device: %w", vm.ErrCannotSave, context.Cause(ctx))
		}
	}
	// Paused it was, and paused it is to be, whatever became of it.
	return errors.Join(err, m.mon.run(context.WithoutCancel(ctx), "stop", nil, nil))
}

// plugVsock brings the device back, if it is not there.
func (m *machine) plugVsock(ctx context.Context) error {
	m.mu.Lock()
	plugged := m.plugged
	m.mu.Unlock()
	if plugged || m.plan.vsock != vsockUser {
		return nil
	}
	if m.vsockChild != nil { // that of the device which was there before
		err := m.mon.run(ctx, "chardev-remove", object{"id": vsockChardev}, nil)
		if _, refused := errors.AsType[*commandError](err); err != nil && !refused {
			return err
		}
		m.children.retire(m.vsockChild)
		m.removeVsockSockets()
	}
	conn, err := m.startVsock(ctx)
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
