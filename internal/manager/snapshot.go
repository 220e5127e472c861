package manager

import (
	"context"
	"fmt"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// snapshotDeadline is for a driver to copy a disk.
const snapshotDeadline = time.Hour

// SnapshotDisk copies a disk of a sandbox that does not run, or is paused; see
// sandbox.Snapshotter.
func (m *Manager) SnapshotDisk(ctx context.Context, name, target string) (made sandbox.DiskSnapshot, err error) {
	err = m.withDisks(ctx, "snapshot a disk of", name, func(ctx context.Context, e *entry, d sandbox.Snapshotter) error {
		made, err = d.SnapshotDisk(ctx, m.ref(name), target)
		if err == nil {
			m.log.Info("disk copied", "sandbox", name, "snapshot", made.ID)
		}
		return err
	})
	return made, err
}

// RestoreDisk makes a disk of a sandbox that does not run what it was.
func (m *Manager) RestoreDisk(ctx context.Context, name, target, id string) error {
	return m.withDisks(ctx, "restore a disk of", name, func(ctx context.Context, e *entry, d sandbox.Snapshotter) error {
		if err := d.RestoreDisk(ctx, m.ref(name), target, id); err != nil {
			return err
		}
		m.log.Info("disk restored", "sandbox", name, "snapshot", id)
		if e.rec.Hibernated {
			drv, err := m.driver(e.rec.Spec.Driver)
			if err != nil {
				return err
			}
			m.loseHibernation(ctx, drv, e)
			m.settle(e)
		}
		return nil
	})
}

// DiskSnapshots lists the copies of a disk, the latest first.
func (m *Manager) DiskSnapshots(ctx context.Context, name, target string) ([]sandbox.DiskSnapshot, error) {
	s, err := m.Sandbox(ctx, name)
	if err != nil {
		return nil, err
	}
	d, err := m.snapshotter("list snapshots of", s)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, inspectDeadline)
	defer cancel()
	found, err := d.DiskSnapshots(ctx, m.ref(name), target)
	return found, deadlined(ctx, err)
}

func (m *Manager) snapshotter(verb string, s *Sandbox) (sandbox.Snapshotter, error) {
	drv, err := m.driver(s.Spec.Driver)
	if err != nil {
		return nil, err
	}
	d, ok := drv.(sandbox.Snapshotter)
	if !ok {
		return nil, fmt.Errorf("%s %s: driver %s cannot: %w", verb, s.Name, s.Spec.Driver, sandbox.ErrUnsupported)
	}
	return d, nil
}

// withDisks does something with the disks of a sandbox that is at rest, and
// keeps it there meanwhile.
func (m *Manager) withDisks(
	ctx context.Context, verb, name string, work func(context.Context, *entry, sandbox.Snapshotter) error,
) error {
	s, err := m.Sandbox(ctx, name)
	if err != nil {
		return err
	}
	d, err := m.snapshotter(verb, s)
	if err != nil {
		return err
	}
	// A boot holds the lock until it is over; it is not waited for.
	switch s.Phase {
	case PhaseStopped, PhaseFailed, PhaseHibernated, PhasePaused:
	default:
		return fmt.Errorf("%s %s: it is %s; stop it first: %w", verb, name, s.Phase, sandbox.ErrState)
	}
	e, err := m.find(name)
	if err != nil {
		return err
	}
	return m.detach(ctx, func(ctx context.Context) error {
		if err := e.lock(ctx); err != nil {
			return err
		}
		defer e.unlock()
		ctx, cancel := context.WithTimeout(ctx, snapshotDeadline)
		defer cancel()
		return deadlined(ctx, work(ctx, e, d))
	})
}
