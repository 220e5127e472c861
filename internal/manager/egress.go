package manager

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

// egressDeadline is for a driver to change or to tell what a policy does.
const egressDeadline = 20 * time.Second

// checkEgress refuses a policy that the driver does not enforce.
func checkEgress(drv sandbox.Driver, spec sandbox.Spec) error {
	if _, ok := drv.(sandbox.EgressPolicer); !ok && !spec.Egress.IsZero() {
		return sandbox.Unsupportedf("spec.egress", "driver %s enforces none; leave it out, or choose one that does", spec.Driver)
	}
	if checker, ok := drv.(sandbox.EgressChecker); ok {
		return checker.CheckEgress(spec)
	}
	return nil
}

// setEgress has the driver take the policy that was recorded. If it does not,
// it is asked again later. It needs the operation lock.
func (m *Manager) setEgress(ctx context.Context, e *entry) error {
	if e.rec.Desired == store.DesiredDeleted {
		return nil
	}
	drv, err := m.driver(e.rec.Spec.Driver)
	if err == nil {
		err = m.applyEgress(ctx, drv, e)
	}
	if err != nil {
		m.log.Warn("egress not set", "sandbox", e.name, "err", err)
		if m.life.Err() == nil {
			m.retryLater(e)
		}
		return fmt.Errorf("%w; it is recorded, and will be tried again", err)
	}
	m.log.Info("egress set", "sandbox", e.name, "mode", e.rec.Spec.Egress.Mode, "rules", len(e.rec.Spec.Egress.Rules))
	return nil
}

// settleEgress is applyEgress, if that was left undone, of a sandbox that was
// observed. One whose artefacts are yet to be made gets its policy with them.
func (m *Manager) settleEgress(ctx context.Context, drv sandbox.Driver, e *entry, obs sandbox.Observation) error {
	if !e.rec.EgressDue || obs.State == sandbox.StateAbsent || obs.State == sandbox.StateBroken {
		return nil
	}
	return m.applyEgress(ctx, drv, e)
}

func (m *Manager) applyEgress(ctx context.Context, drv sandbox.Driver, e *entry) error {
	policer, ok := drv.(sandbox.EgressPolicer)
	if !ok {
		return checkEgress(drv, e.rec.Spec)
	}
	m.step("egress:set")
	ctx, cancel := context.WithTimeout(ctx, egressDeadline)
	defer cancel()
	err := policer.SetEgress(ctx, m.ref(e.name), e.rec.Spec.Egress.Clone())
	if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		return deadlined(ctx, err)
	}
	m.step("egress:done")
	return m.put(e, func(r *store.Record) { r.EgressDue = false }, nil)
}

// Refusals tells what a sandbox was kept from by its egress in its present
// life, the latest first, and how often in all; nothing of one that has none.
func (m *Manager) Refusals(ctx context.Context, name string) (recent []sandbox.Refusal, total uint64, err error) {
	s, err := m.Sandbox(ctx, name)
	if err != nil {
		return nil, 0, err
	}
	drv, err := m.driver(s.Spec.Driver)
	if err != nil {
		return nil, 0, err
	}
	policer, ok := drv.(sandbox.EgressPolicer)
	if !ok {
		return nil, 0, fmt.Errorf("refusals of %s: driver %s enforces no egress: %w", name, s.Spec.Driver, sandbox.ErrUnsupported)
	}
	ctx, cancel := context.WithTimeout(ctx, egressDeadline)
	defer cancel()
	recent, total, err = policer.EgressRefused(ctx, m.ref(name))
	if errors.Is(err, sandbox.ErrState) || errors.Is(err, sandbox.ErrNotFound) {
		return nil, 0, nil
	}
	return recent, total, deadlined(ctx, err)
}
