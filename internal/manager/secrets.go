package manager

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/secrets"
)

// pushers is how many sandboxes are given their secrets anew at once.
const pushers = 8

// given is what a sandbox was given as secrets: all that is kept of it, in
// memory alone.
type given struct {
	// inline are the values set over the API, by the NAME of inline:NAME.
	inline map[string]secrets.Value
	// items are those of the last delivery, without their values.
	items []GivenSecret
}

// GivenSecret is one secret that a sandbox has, or should have.
type GivenSecret struct {
	Name, Source string
	File         bool
	Optional     bool
	// Version changes with the value; empty: not given since the agent started.
	Version string
	GivenAt time.Time
	// Missing is why an optional one was left out; empty: it was not.
	Missing string
}

// checkSecrets refuses secrets, and a keyless sandbox's environment, that
// could never be delivered.
func (m *Manager) checkSecrets(spec sandbox.Spec) error {
	if m.cfg.Secrets == nil {
		if len(spec.Secrets) > 0 {
			return sandbox.Unsupportedf("spec.secrets", "this agent delivers none; leave it out")
		}
		return nil
	}
	return m.cfg.Secrets.Check(spec.Secrets, spec.Keyless, spec.Env)
}

// checkInline refuses values that no secret of the spec asks for.
func checkInline(spec sandbox.Spec, values map[string][]byte) error {
	for name := range values {
		wanted := slices.ContainsFunc(spec.Secrets, func(ref sandbox.SecretRef) bool { return ref.Source == "inline:"+name })
		if !wanted {
			return sandbox.Invalidf("secret_values["+name+"]", "is for no secret of the spec; give one the source inline:%s", name)
		}
	}
	return nil
}

// keepInline keeps values for inline secrets.
func (e *entry) keepInline(values map[string][]byte) {
	if len(values) == 0 {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.given.inline == nil {
		e.given.inline = map[string]secrets.Value{}
	}
	for name, value := range values {
		e.given.inline[name] = secrets.NewValue(value)
	}
}

// resolve reads the sources of a sandbox's secrets.
func (m *Manager) resolve(ctx context.Context, e *entry) (secrets.Set, error) {
	s := e.snap.Load()
	if len(s.Spec.Secrets) == 0 || m.cfg.Secrets == nil {
		return secrets.Set{}, m.checkSecrets(s.Spec)
	}
	e.mu.Lock()
	inline := maps.Clone(e.given.inline)
	e.mu.Unlock()
	return m.cfg.Secrets.Resolve(ctx, s.Spec.Secrets, inline, s.Spec.Keyless)
}

// secretValues is a set in the guest's terms. Only here, and for as long as
// the call takes, are values outside of secrets.Value.
func secretValues(set secrets.Set) []guest.Secret {
	var values []guest.Secret
	for _, item := range set.Items {
		values = append(values, guest.Secret{Name: item.Name, Value: item.Value.Reveal(), File: item.File})
	}
	return values
}

// noteGiven remembers what was delivered.
func (e *entry) noteGiven(spec sandbox.Spec, set secrets.Set) {
	now := time.Now()
	var items []GivenSecret
	optional := func(source string) bool {
		return slices.ContainsFunc(spec.Secrets, func(r sandbox.SecretRef) bool { return r.Source == source && r.Optional })
	}
	for _, item := range set.Items {
		items = append(items, GivenSecret{
			Name: item.Name, Source: item.Source, File: item.File, Optional: optional(item.Source),
			Version: item.Version, GivenAt: now,
		})
	}
	for _, missing := range set.Missing {
		items = append(items, GivenSecret{
			Name: missing.Name, Source: missing.Source, Optional: true, Missing: missing.Err.Error(),
		})
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.given.items = items
}

// Secrets returns what a sandbox has, or is to have, as secrets; no values.
func (m *Manager) Secrets(ctx context.Context, name string) ([]GivenSecret, error) {
	s, err := m.Sandbox(ctx, name)
	if err != nil {
		return nil, err
	}
	e, err := m.find(name)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	items := slices.Clone(e.given.items)
	e.mu.Unlock()
	if len(items) > 0 {
		return items, nil
	}
	for _, ref := range s.Spec.Secrets {
		items = append(items, GivenSecret{Name: ref.Name, Source: ref.Source, File: ref.File, Optional: ref.Optional})
	}
	return items, nil
}

// KeepSecrets keeps values for a sandbox's inline secrets until its next boot.
func (m *Manager) KeepSecrets(name string, values map[string][]byte) error {
	e, err := m.find(name)
	if err != nil {
		return err
	}
	if err := checkInline(e.view().Spec, values); err != nil {
		return err
	}
	e.keepInline(values)
	return nil
}

// SetSecrets keeps values for a sandbox's inline secrets, and delivers them if
// it runs: then the delivery is not nil.
func (m *Manager) SetSecrets(ctx context.Context, name string, values map[string][]byte) (*Delivery, error) {
	s, err := m.Sandbox(ctx, name)
	if err != nil {
		return nil, err
	}
	if len(values) == 0 {
		return nil, sandbox.Invalidf("values", "is missing")
	}
	if err := checkInline(s.Spec, values); err != nil {
		return nil, err
	}
	e, err := m.find(name)
	if err != nil {
		return nil, err
	}
	e.keepInline(values)
	if !s.isReady() && !s.isPaused() {
		return nil, nil //nolint:nilnil // Nothing was delivered, and that is no error.
	}
	delivery := m.deliver(ctx, e, false)
	return &delivery, nil
}

// Delivery is what came of giving one sandbox its secrets anew.
type Delivery struct {
	Name string
	// Changed are the names whose values were others before, sorted.
	Changed []string
	// Action is what was done with the workload; empty: nothing changed.
	Action sandbox.RotationAction
	// Err is why it did not acknowledge them; nil: it did.
	Err error
}

// PushSecrets reads the sources of secrets again and delivers what changed to
// a sandbox, or with an empty name to all that match and run.
func (m *Manager) PushSecrets(ctx context.Context, name string, sel Selector, force bool) ([]Delivery, error) {
	var targets []*entry
	if name != "" {
		s, err := m.Sandbox(ctx, name)
		if err != nil {
			return nil, err
		}
		if !s.isReady() && !s.isPaused() {
			return nil, fmt.Errorf("push secrets to %s: it is %s, and is given them when it starts: %w", name, s.Phase, sandbox.ErrState)
		}
		e, err := m.find(name)
		if err != nil {
			return nil, err
		}
		targets = append(targets, e)
	} else {
		m.mu.RLock()
		for _, e := range m.entries {
			if s := e.snap.Load(); (s.isReady() || s.isPaused()) && len(s.Spec.Secrets) > 0 && sel.Matches(s.Labels) {
				targets = append(targets, e)
			}
		}
		m.mu.RUnlock()
	}
	deliveries := make([]Delivery, len(targets))
	turns := make(chan struct{}, pushers)
	var all sync.WaitGroup
	for i, e := range targets {
		all.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			deliveries[i] = m.deliver(ctx, e, force)
		})
	}
	all.Wait()
	slices.SortFunc(deliveries, func(a, b Delivery) int { return cmp.Compare(a.Name, b.Name) })
	return deliveries, ctx.Err()
}

// deliver gives a running sandbox its secrets anew and does with the workload
// what its spec says. One that is paused is resumed for it.
func (m *Manager) deliver(ctx context.Context, e *entry, force bool) Delivery {
	d := Delivery{Name: e.name}
	if _, d.Err = m.awake(ctx, e.name); d.Err != nil {
		return d
	}
	rotation := e.snap.Load().Spec.Rotation
	action := cmp.Or(rotation.Action, sandbox.RotationLeave)
	d.Err = m.detach(ctx, func(ctx context.Context) (err error) {
		if err := e.lock(ctx); err != nil {
			return err
		}
		defer e.unlock()
		d.Changed, err = m.update(ctx, e, action, force)
		return err
	})
	if d.Err != nil || len(d.Changed) == 0 && !force {
		return d
	}
	d.Action = action
	m.log.Info("secrets given", "sandbox", e.name, "changed", d.Changed, "action", action)
	if action == sandbox.RotationRestart {
		_, d.Err = m.Restart(ctx, e.name, DefaultGrace, Request{})
	}
	return d
}

// update resolves and delivers. It needs the operation lock.
func (m *Manager) update(ctx context.Context, e *entry, action sandbox.RotationAction, force bool) ([]string, error) {
	if !e.snap.Load().isReady() {
		return nil, fmt.Errorf("give secrets to %s: it does not run: %w", e.name, sandbox.ErrState)
	}
	drv, err := m.driver(e.rec.Spec.Driver)
	if err != nil {
		return nil, err
	}
	set, err := m.resolve(ctx, e)
	if err != nil {
		return nil, err
	}
	defer set.Wipe()
	var signal int32
	if action == sandbox.RotationSignal {
		if signal, err = sandbox.ParseSignal("spec.secret_rotation.signal", cmp.Or(e.rec.Spec.Rotation.Signal, "HUP")); err != nil {
			return nil, err
		}
	}
	changed, err := m.guest(drv, e.name).UpdateSecrets(ctx, secretValues(set), signal, force)
	if err != nil {
		return nil, err
	}
	e.noteGiven(e.rec.Spec, set)
	slices.Sort(changed)
	return changed, nil
}

// forgetSecrets drops all that is kept of them.
func (e *entry) forgetSecrets() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, value := range e.given.inline {
		value.Wipe()
	}
	e.given = given{}
}
