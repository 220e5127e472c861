// Package manager keeps sandboxes as they are meant to be. It writes an intent
// durably, acts through a driver, then observes; at whatever instant the
// process dies, the next one reads the intent, asks the driver what is true,
// and finishes or cleans up.
//
// Each sandbox has one operation lock: whoever holds it may change the record
// and call the driver. Reads take no lock but that of a pointer. A boot is a
// flight that any number of callers share and that only a stop, a restart, a
// deletion or the manager's own deadline ends.
//
// The package refuses to know any driver by name, to keep observations in the
// store, and to bind work to the life of the request that asked for it.
package manager

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/choiros/agent/internal/exposure"
	"github.com/choiros/agent/internal/forward"
	"github.com/choiros/agent/internal/hostclock"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/secrets"
	"github.com/choiros/agent/internal/store"
)

// Config is what a Manager is made of. Zero values take the defaults.
type Config struct {
	Store   *store.Store
	Drivers map[string]sandbox.Driver
	// DefaultDriver is meant by an empty Spec.Driver; empty: the only one.
	DefaultDriver string
	Classes       map[string]Class
	// MountRoots are the host folders that mounts may come from; empty: any.
	MountRoots []string
	// MaxConcurrentBoots is how many boots run at once; more wait. Default 10:
	// fifty microVMs at once were seen to fail, ten at a time never.
	MaxConcurrentBoots int
	// MaxRunning is how many sandboxes may run; default 200.
	MaxRunning int
	// MinFreeMemoryMiB refuses boots while less is available; default 1024.
	MinFreeMemoryMiB uint64
	// Secrets reads the sources of secrets; nil: specs may have none.
	Secrets *secrets.Resolver
	// Ports is how ports are forwarded; its Backend and Log are set by Open.
	Ports forward.Config
	// IdleScan is the pause between two looks for idle sandboxes; default 30 s.
	IdleScan time.Duration
	// Clock reads the host's clocks every ClockScan; default: hostclock.Read,
	// every hostclock.Interval.
	Clock     func() (hostclock.Reading, error)
	ClockScan time.Duration
	Log       *slog.Logger
	// OnStep, if set, is called with the name of each step of an operation
	// just before it is taken; tests kill the process there.
	OnStep func(step string)
	// Memory returns the host's memory in MiB; default: of this host.
	Memory func() (total, available uint64, err error)
}

// Class is a row of the table of machine classes.
type Class struct {
	Driver    string // empty: any
	Resources sandbox.Resources
}

// Manager keeps the sandboxes of one host.
type Manager struct {
	cfg       Config
	log       *slog.Logger
	store     *store.Store
	feed      *feed
	hostBoot  string
	startedAt time.Time

	// life ends with Run. It is the one context kept in a struct: the work it
	// bounds belongs to the manager and to no call.
	life   context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup

	// reconciled is closed once every record was compared with the host.
	reconciled chan struct{}
	loaded     []*entry // those that Open read; for reconcileAll alone
	slots      *slots
	forward    *forward.Forwarder
	probes     probeCache
	looker     *exposure.Looker
	requests   requests
	// The constants of these names; tests have less time.
	wakeLimit, farewell time.Duration

	mu       sync.RWMutex
	entries  map[string]*entry
	draining bool
}

// Open reads the records. Nothing is done to any sandbox before Run.
func Open(cfg Config) (*Manager, error) {
	cfg.defaults()
	if _, ok := cfg.Drivers[cfg.DefaultDriver]; !ok && cfg.DefaultDriver != "" {
		return nil, sandbox.Invalidf("default_driver", "%q is none of this agent's drivers (%v)",
			cfg.DefaultDriver, sortedKeys(cfg.Drivers))
	}
	host, err := cfg.Store.Host()
	if err != nil {
		return nil, err
	}
	records, err := cfg.Store.Load()
	if err != nil {
		return nil, err
	}
	bootID, err := hostBootID()
	if err != nil {
		return nil, fmt.Errorf("boot id of this host: %w", err)
	}
	m := &Manager{
		cfg: cfg, log: cfg.Log, store: cfg.Store,
		feed: newFeed(), hostBoot: bootID, startedAt: time.Now(),
		reconciled: make(chan struct{}),
		slots:      newSlots(cfg.MaxConcurrentBoots),
		looker:     exposure.New(),
		requests:   requests{calls: map[string]*call{}},
		wakeLimit:  wakeLimit, farewell: farewell,
		entries:  make(map[string]*entry, len(records)),
		draining: host.Draining,
	}
	m.life, m.cancel = context.WithCancel(context.Background())
	cfg.Ports.Backend, cfg.Ports.Log = m, cfg.Log
	m.forward = forward.New(cfg.Ports)
	for _, rec := range records {
		e := newEntry(rec.Name) // locked until it is reconciled
		e.rec = rec
		e.touch(m.startedAt)
		m.entries[rec.Name] = e
		m.loaded = append(m.loaded, e)
		m.publish(e, func(s *Sandbox) { s.Phase = PhaseUnknown })
	}
	// At once, so that clients wait for their sandbox instead of being refused.
	var deleted []store.Record
	for _, rec := range records {
		if rec.Desired == store.DesiredDeleted {
			deleted = append(deleted, rec)
			continue
		}
		m.openPorts(rec.Name, rec.Leases)
	}
	m.forward.DropUnclaimed()
	for _, rec := range deleted {
		m.holdPorts(rec.Name, rec.Leases)
	}
	return m, nil
}

// Close closes what Open opened. Run does so too.
func (m *Manager) Close() error { return m.forward.Close() }

func (c *Config) defaults() {
	c.MaxConcurrentBoots = cmp.Or(c.MaxConcurrentBoots, 10)
	c.MaxRunning = cmp.Or(c.MaxRunning, 200)
	c.MinFreeMemoryMiB = cmp.Or(c.MinFreeMemoryMiB, 1024)
	c.IdleScan = cmp.Or(c.IdleScan, 30*time.Second)
	c.ClockScan = cmp.Or(c.ClockScan, hostclock.Interval)
	if c.Clock == nil {
		c.Clock = hostclock.Read
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Memory == nil {
		c.Memory = hostMemory
	}
	if c.DefaultDriver == "" && len(c.Drivers) == 1 {
		for name := range c.Drivers {
			c.DefaultDriver = name
		}
	}
}

// Run reconciles records and host, then keeps them so until ctx ends. It
// returns once all that it started has stopped; sandboxes run on. Calls that
// concern a sandbox wait until that one was reconciled.
func (m *Manager) Run(ctx context.Context) error {
	m.work.Go(m.reconcileAll)
	m.work.Go(m.tendIdle)
	m.work.Go(m.tendClocks)
	<-ctx.Done()
	err := m.forward.Close()
	m.cancel()
	m.work.Wait()
	return err
}

// detach runs work to its end, whatever becomes of ctx; only the manager's own
// end cancels it. If ctx ends first, the caller gets its error and leaves.
func (m *Manager) detach(ctx context.Context, work func(ctx context.Context) error) error {
	done := make(chan error, 1)
	inner, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(m.life, cancel)
	m.work.Go(func() {
		defer cancel()
		defer stop()
		done <- work(inner)
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// step tells tests how far an operation is.
func (m *Manager) step(name string) {
	if m.cfg.OnStep != nil {
		m.cfg.OnStep(name)
	}
}

// driver returns the driver of a spec, and the spec's name for it.
func (m *Manager) driver(name string) (sandbox.Driver, error) {
	drv, ok := m.cfg.Drivers[name]
	if !ok {
		return nil, sandbox.Invalidf("spec.driver", "%q is none of this agent's drivers (%v)",
			name, sortedKeys(m.cfg.Drivers))
	}
	return drv, nil
}

// ref is how a driver finds a sandbox.
func (m *Manager) ref(name string) sandbox.Ref {
	return sandbox.Ref{ID: name, Dir: m.store.SandboxDir(name)}
}

// find returns the entry of a sandbox that callers may know of.
func (m *Manager) find(name string) (*entry, error) {
	e, err := m.lookUp(name)
	if err == nil && e.snap.Load() == nil {
		return nil, fmt.Errorf("sandbox %s: %w", name, sandbox.ErrNotFound)
	}
	return e, err
}

// lookUp is find, and also returns the entry of a sandbox whose creation has
// only just begun.
func (m *Manager) lookUp(name string) (*entry, error) {
	if err := sandbox.ValidateName("name", name); err != nil {
		return nil, err
	}
	m.mu.RLock()
	e := m.entries[name]
	m.mu.RUnlock()
	if e == nil {
		return nil, fmt.Errorf("sandbox %s: %w", name, sandbox.ErrNotFound)
	}
	return e, nil
}

// Sandbox returns a sandbox as it is now.
func (m *Manager) Sandbox(ctx context.Context, name string) (*Sandbox, error) {
	e, err := m.find(name)
	if err != nil {
		return nil, err
	}
	select {
	case <-e.reconciled:
		return e.view(), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// List returns up to limit sandboxes that match, in the order of their names,
// beginning after the name after; more says whether others follow.
func (m *Manager) List(ctx context.Context, sel Selector, after string, limit int) (page []*Sandbox, more bool, err error) {
	select {
	case <-m.reconciled:
	case <-ctx.Done():
		return nil, false, ctx.Err()
	}
	m.mu.RLock()
	entries := make([]*entry, 0, len(m.entries))
	for name, e := range m.entries {
		if name > after {
			entries = append(entries, e)
		}
	}
	m.mu.RUnlock()
	slices.SortFunc(entries, func(a, b *entry) int { return cmp.Compare(a.name, b.name) })
	for _, e := range entries {
		snap := e.snap.Load()
		if snap == nil || !sel.Matches(snap.Labels) {
			continue
		}
		if len(page) == limit {
			return page, true, nil
		}
		page = append(page, e.view())
	}
	return page, false, nil
}

// Logs yields what a sandbox printed; see sandbox.LogSource.
func (m *Manager) Logs(ctx context.Context, name string, opts sandbox.LogOptions, yield func(sandbox.LogEntry) error) error {
	e, err := m.find(name)
	if err != nil {
		return err
	}
	drv, err := m.driver(e.view().Spec.Driver)
	if err != nil {
		return err
	}
	source, ok := drv.(sandbox.LogSource)
	if !ok {
		return fmt.Errorf("logs of %s: its driver keeps none: %w", name, sandbox.ErrUnsupported)
	}
	return source.Logs(ctx, m.ref(name), opts, yield)
}

// Touch counts as activity.
func (m *Manager) Touch(_ context.Context, name string) (time.Time, error) {
	e, err := m.find(name)
	if err != nil {
		return time.Time{}, err
	}
	now := time.Now()
	e.touch(now)
	return now, nil
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
