package manager

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

// probeAge is how long a driver's report is good for, and probeDeadline how
// long it may take to make.
const (
	probeAge      = 5 * time.Second
	probeDeadline = 10 * time.Second
)

// DriverInfo is one driver of this agent.
type DriverInfo struct {
	Name      string
	Report    sandbox.Report
	Err       error // why it is unavailable; nil: it is available
	Abilities []string
}

// Info is what the agent is and what its drivers can do.
type Info struct {
	Drivers            []DriverInfo
	DefaultDriver      string
	Classes            map[string]Class
	Draining           bool
	Quarantined        []store.Quarantined
	MaxConcurrentBoots int
	MaxRunning         int
	MemoryTotalMiB     uint64
	Reconciled         bool
	StartedAt          time.Time
}

// probeCache keeps the drivers' last reports.
type probeCache struct {
	mu      sync.Mutex
	at      time.Time
	drivers []DriverInfo
}

// Info probes the drivers, at most every few seconds.
func (m *Manager) Info(ctx context.Context) (Info, error) {
	total, _, err := m.cfg.Memory()
	if err != nil {
		return Info{}, fmt.Errorf("memory of this host: %w", err)
	}
	info := Info{
		Drivers: m.probeAll(ctx), DefaultDriver: m.cfg.DefaultDriver, Classes: m.cfg.Classes,
		Quarantined: m.store.Quarantined(), MaxConcurrentBoots: m.cfg.MaxConcurrentBoots,
		MaxRunning: m.cfg.MaxRunning, MemoryTotalMiB: total, StartedAt: m.startedAt,
	}
	m.mu.RLock()
	info.Draining = m.draining
	m.mu.RUnlock()
	select {
	case <-m.reconciled:
		info.Reconciled = true
	default:
	}
	return info, nil
}

func (m *Manager) probeAll(ctx context.Context) []DriverInfo {
	m.probes.mu.Lock()
	if time.Since(m.probes.at) < probeAge {
		defer m.probes.mu.Unlock()
		return m.probes.drivers
	}
	m.probes.mu.Unlock()
	// What is found is kept for others, so the caller's leaving must not end it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeDeadline)
	defer cancel()
	names := sortedKeys(m.cfg.Drivers)
	found := make([]DriverInfo, len(names))
	var probes sync.WaitGroup
	for i, name := range names {
		probes.Go(func() {
			drv := m.cfg.Drivers[name]
			report, err := drv.Probe(ctx)
			found[i] = DriverInfo{Name: name, Report: report, Err: deadlined(ctx, err), Abilities: sandbox.Abilities(drv)}
		})
	}
	probes.Wait()
	m.probes.mu.Lock()
	defer m.probes.mu.Unlock()
	m.probes.at, m.probes.drivers = time.Now(), found
	return found
}

// Stats is how busy the host is.
type Stats struct {
	MemoryTotalMiB, MemoryAvailableMiB uint64
	Phases                             map[Phase]int
	BootsRunning, BootsWaiting         int
}

// Stats measures the host and counts sandboxes.
func (m *Manager) Stats() (Stats, error) {
	total, available, err := m.cfg.Memory()
	if err != nil {
		return Stats{}, fmt.Errorf("memory of this host: %w", err)
	}
	stats := Stats{
		MemoryTotalMiB: total, MemoryAvailableMiB: available, Phases: map[Phase]int{},
		BootsRunning: len(m.slots.taken), BootsWaiting: int(m.slots.waiting.Load()),
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, e := range m.entries {
		if s := e.snap.Load(); s != nil {
			stats.Phases[s.Phase]++
		}
	}
	return stats, nil
}

// Drain refuses boots until Undrain, also after a restart of the agent, and
// stops what runs if asked to. It returns how many sandboxes it stopped.
func (m *Manager) Drain(ctx context.Context, stop bool, grace time.Duration) (int, error) {
	if err := checkGrace(grace); err != nil {
		return 0, err
	}
	if err := m.setDraining(true); err != nil {
		return 0, err
	}
	if !stop {
		return 0, nil
	}
	stopped := 0
	err := m.detach(ctx, func(ctx context.Context) error {
		m.mu.RLock()
		var running []*entry
		for _, e := range m.entries {
			if s := e.snap.Load(); s != nil && s.Desired == DesiredRunning {
				running = append(running, e)
			}
		}
		m.mu.RUnlock()
		errs := make([]error, len(running))
		var stops sync.WaitGroup
		for i, e := range running {
			e.interrupt(errStopping)
			arrived := e.hasten(grace)
			stops.Go(func() {
				errs[i] = e.lock(ctx)
				arrived()
				if errs[i] == nil {
					defer e.unlock()
					errs[i] = m.stop(ctx, e, grace, "DRAINED")
				}
			})
		}
		stops.Wait()
		for i, err := range errs {
			switch {
			case err == nil:
				stopped++
			case errors.Is(err, sandbox.ErrNotFound):
				errs[i] = nil // deleted meanwhile
			}
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return 0, fmt.Errorf("drain: %w", err)
	}
	return stopped, nil
}

// Undrain accepts boots again.
func (m *Manager) Undrain(context.Context) error { return m.setDraining(false) }

func (m *Manager) setDraining(draining bool) error {
	if err := m.store.PutHost(store.Host{Draining: draining}); err != nil {
		return fmt.Errorf("%w: %w", sandbox.ErrExhausted, err)
	}
	m.mu.Lock()
	m.draining = draining
	m.mu.Unlock()
	m.log.Info("draining", "draining", draining)
	return nil
}

// Images returns the image store of a driver; empty: the default one.
func (m *Manager) Images(driver string) (sandbox.ImageStore, error) {
	if driver == "" {
		driver = m.cfg.DefaultDriver
	}
	drv, ok := m.cfg.Drivers[driver]
	if !ok {
		return nil, sandbox.Invalidf("driver", "%q is none of this agent's drivers (%v)", driver, sortedKeys(m.cfg.Drivers))
	}
	images, ok := drv.(sandbox.ImageStore)
	if !ok {
		return nil, sandbox.Unsupportedf("driver", "%q keeps no images", driver)
	}
	return images, nil
}
