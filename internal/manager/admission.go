package manager

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/choiros/agent/internal/sandbox"
)

// slots bounds how many boots run at once.
type slots struct {
	taken   chan struct{}
	waiting atomic.Int64
}

func newSlots(n int) *slots { return &slots{taken: make(chan struct{}, n)} }

// acquire waits for a slot, calling queued if there is none at once. The
// caller calls release when its boot is over.
func (s *slots) acquire(ctx context.Context, queued func()) (release func(), err error) {
	free := func() { <-s.taken }
	select {
	case s.taken <- struct{}{}:
		return free, nil
	default:
	}
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	queued()
	select {
	case s.taken <- struct{}{}:
		return free, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// admit lets a sandbox count as one that runs, or says why it may not. Boots
// hold a slot meanwhile, so at most that many are admitted on one measurement.
func (m *Manager) admit(e *entry) error {
	if err := m.mayBoot(e.name); err != nil {
		return err
	}
	if err := m.roomForOne(); err != nil {
		return err
	}
	e.admitted.Store(true)
	return nil
}

// roomForOne reports, as an error, that the host can take no more.
func (m *Manager) roomForOne() error {
	running := 0
	m.mu.RLock()
	for _, e := range m.entries {
		if e.admitted.Load() {
			running++
		}
	}
	m.mu.RUnlock()
	if running >= m.cfg.MaxRunning {
		return &sandbox.RetryError{
			Err:   fmt.Errorf("%w: %d sandboxes run, and max_running is %d", sandbox.ErrExhausted, running, m.cfg.MaxRunning),
			After: retryPause,
		}
	}
	_, available, err := m.cfg.Memory()
	if err != nil {
		return fmt.Errorf("memory of this host: %w", err)
	}
	if available < m.cfg.MinFreeMemoryMiB {
		return &sandbox.RetryError{
			Err: fmt.Errorf("%w: %d MiB of memory are available, and min_free_memory_mib is %d",
				sandbox.ErrExhausted, available, m.cfg.MinFreeMemoryMiB),
			After: retryPause,
		}
	}
	return nil
}
