package container

import (
	"context"

	"github.com/containers/podman/v5/pkg/bindings/containers"
	"github.com/containers/podman/v5/pkg/domain/entities/types"

	"github.com/choiros/agent/internal/sandbox"
)

// allCPUMillis lifts a limit on CPU that was set: as much as a spec may ask for,
// which is more than any host has. See resources for why it is a number.
const allCPUMillis = 1024 * 1000

// Resize implements sandbox.Resizer. The new limits hold at once, also for one
// that runs.
func (d *Driver) Resize(ctx context.Context, ref sandbox.Ref, limits sandbox.Resources) error {
	return op("resize", ref.ID, d.resize(ctx, ref, limits))
}

func (d *Driver) resize(ctx context.Context, ref sandbox.Ref, limits sandbox.Resources) error {
	data, _, err := d.inspect(ctx, ref.ID)
	if err == nil && data == nil {
		err = d.whyAbsent(ctx, ref.ID)
	}
	if err != nil {
		return err
	}
	facts, err := d.facts(ctx)
	if err != nil {
		return err
	}
	if err := checkLimits(limits, facts); err != nil {
		return err
	}
	if facts.limits == (sandbox.Limits{}) {
		return nil
	}
	changed := resources(limits, facts.limits)
	if facts.limits.CPU && limits.CPUMillis == 0 {
		changed.CPU = cpuQuota(allCPUMillis) // what is not said stays as it was
	}
	err = d.settle(ctx, readLimit, func(ctx context.Context) error {
		_, err := containers.Update(ctx, &types.ContainerUpdateOptions{NameOrID: data.ID, Resources: changed})
		return err
	})
	if isNotFound(err) {
		return sandbox.ErrNotFound
	}
	return err
}
