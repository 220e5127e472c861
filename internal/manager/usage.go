package manager

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/sandbox"
)

// Usage is what a sandbox uses.
type Usage struct {
	Name       string
	Generation uint64
	// Sample is as the guest says it, and so not to be trusted.
	Sample *guestv1.Stats
	// CPUMillis is of one CPU, in thousandths, since the sample before;
	// negative: there was none.
	CPUMillis int64
}

// usageWait is how long a first sample is waited for.
const usageWait = 2 * time.Second

// WatchUsage calls see, at once and at every interval, with what a sandbox
// uses, or with an empty name all that match and run; until ctx ends or see
// returns an error, which WatchUsage then returns. once: it is called once.
func (m *Manager) WatchUsage(ctx context.Context, name string, sel Selector, interval time.Duration, once bool, see func([]Usage) error) error {
	if name != "" {
		s, err := m.Sandbox(ctx, name)
		if err != nil {
			return err
		}
		if s.Phase != PhaseReady && once {
			return fmt.Errorf("sandbox %s is %s: %w", name, s.Phase, sandbox.ErrState)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	w := usageWatch{manager: m, name: name, sel: sel, interval: interval, meters: map[string]*meter{}}
	defer w.wait.Wait()
	defer cancel()
	w.adjust(ctx)
	w.settle(ctx)
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := see(w.samples()); err != nil || once {
			return err
		}
		select {
		case <-ticker.C:
			w.adjust(ctx)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// usageWatch is one call of WatchUsage.
type usageWatch struct {
	manager  *Manager
	name     string
	sel      Selector
	interval time.Duration
	wait     sync.WaitGroup
	meters   map[string]*meter
}

// meter is the watch over one life of one sandbox.
type meter struct {
	generation uint64
	cancel     context.CancelFunc
	first      chan struct{} // closed once there is a sample, or will be none

	mu     sync.Mutex
	before *guestv1.Stats
	last   *guestv1.Stats
}

// adjust begins to watch what runs, and ends with what does not.
func (w *usageWatch) adjust(ctx context.Context) {
	running := map[string]*Sandbox{}
	w.manager.mu.RLock()
	for name, e := range w.manager.entries {
		if s := e.snap.Load(); s.isReady() && (w.name == name || w.name == "" && w.sel.Matches(s.Labels)) {
			running[name] = s
		}
	}
	w.manager.mu.RUnlock()
	for name, watched := range w.meters {
		if s := running[name]; s == nil || s.Generation != watched.generation {
			watched.cancel()
			delete(w.meters, name)
		}
	}
	for name, s := range running {
		if w.meters[name] != nil {
			continue
		}
		drv, err := w.manager.driver(s.Spec.Driver)
		if err != nil {
			continue
		}
		ctx, cancel := context.WithCancel(ctx)
		watched := &meter{generation: s.Generation, cancel: cancel, first: make(chan struct{})}
		w.meters[name] = watched
		w.wait.Go(func() {
			defer cancel()
			defer watched.close()
			// If it fails, the sandbox is left out.
			_ = w.manager.guest(drv, name).WatchStats(ctx, w.interval, func(sample *guestv1.Stats) error {
				watched.add(sample)
				return nil
			})
		})
	}
}

func (t *meter) add(sample *guestv1.Stats) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.last == nil {
		close(t.first)
	}
	t.before, t.last = t.last, sample
}

// close notes that no more samples come.
func (t *meter) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.last == nil {
		close(t.first)
	}
	t.before, t.last = nil, nil
}

// settle waits a while for the first samples.
func (w *usageWatch) settle(ctx context.Context) {
	limit := time.NewTimer(usageWait)
	defer limit.Stop()
	for _, watched := range w.meters {
		select {
		case <-watched.first:
		case <-limit.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// samples are the last there are, by name.
func (w *usageWatch) samples() []Usage {
	var all []Usage
	for name, watched := range w.meters {
		watched.mu.Lock()
		if watched.last != nil {
			all = append(all, Usage{
				Name: name, Generation: watched.generation, Sample: watched.last, CPUMillis: cpuMillis(watched.before, watched.last),
			})
		}
		watched.mu.Unlock()
	}
	slices.SortFunc(all, func(a, b Usage) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// cpuMillis is what of a CPU was used between two samples.
func cpuMillis(before, last *guestv1.Stats) int64 {
	if before == nil {
		return -1
	}
	elapsed := last.GetTime().AsTime().Sub(before.GetTime().AsTime()).Microseconds()
	used := int64(last.GetCpuUsec()) - int64(before.GetCpuUsec()) //nolint:gosec // Microseconds of 292,000 years.
	if elapsed <= 0 || used < 0 {
		return -1
	}
	return used * 1000 / elapsed
}
