package container

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/containers/podman/v5/libpod/define"
	"github.com/containers/podman/v5/pkg/bindings/containers"

	"github.com/choiros/agent/internal/sandbox"
)

// Create implements sandbox.Driver.
func (d *Driver) Create(ctx context.Context, ref sandbox.Ref, spec sandbox.Spec) error {
	if err := sandbox.ValidateName("name", ref.ID); err != nil {
		return err
	}
	err := d.create(ctx, ref, spec)
	if err == nil || ctx.Err() != nil {
		return op("create", ref.ID, err)
	}
	// One that exists is enough, even if its spec would not do today.
	if data, _, inspected := d.inspect(ctx, ref.ID); inspected == nil && data != nil {
		return nil
	}
	return op("create", ref.ID, err)
}

func (d *Driver) create(ctx context.Context, ref sandbox.Ref, spec sandbox.Spec) error {
	p, err := d.plan(ctx, ref, spec)
	if err != nil {
		return err
	}
	if err := makeDir(ref); err != nil {
		return err
	}
	generator := p.container()
	for {
		begun := time.Now()
		err = d.settle(ctx, createLimit, func(ctx context.Context) error {
			_, err := containers.CreateWithSpec(ctx, generator, nil)
			return err
		})
		if !caused(err, define.ErrCtrExists) && !caused(err, errNameInUse) {
			return err
		}
		// It exists, or another process is making it, or was and was killed.
		exists, conflict := d.settleName(ctx, ref.ID, begun)
		if exists || conflict != nil {
			return conflict
		}
	}
}

// halfTime is how long a container may be half made before it counts as left
// behind. Podman takes some milliseconds from the one half to the other.
const halfTime = 3 * time.Second

// settleName finds out what has the name of a sandbox's container: whether it
// exists, and if not, that the name is free now. What stays half made is
// removed, if it was for long enough since a moment.
func (d *Driver) settleName(ctx context.Context, id string, since time.Time) (exists bool, err error) {
	for {
		data, foreign, err := d.inspect(ctx, id)
		switch {
		case err != nil:
			return false, err
		case foreign:
			return false, fmt.Errorf("%w: container %s, which this agent did not make; podman rename gives it another name",
				sandbox.ErrExists, d.name(id))
		case data != nil && observation(data.State).State != sandbox.StateBroken:
			return true, nil
		}
		found, err := d.artefacts(ctx, id)
		if err != nil {
			return false, err
		}
		found = slices.DeleteFunc(found, func(a artefact) bool { return a.lookup })
		if len(found) == 0 {
			return false, pause(ctx, tryPause/5)
		}
		if time.Since(since) > halfTime {
			for _, a := range found {
				if err := d.remove(ctx, a.containerID); err != nil {
					return false, err
				}
			}
			return false, nil
		}
		if err := pause(ctx, tryPause); err != nil {
			return false, err
		}
	}
}

// pause sleeps, or returns ctx's error.
func pause(ctx context.Context, t time.Duration) error {
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// Start implements sandbox.Driver.
func (d *Driver) Start(ctx context.Context, ref sandbox.Ref) error {
	return op("start", ref.ID, d.start(ctx, ref))
}

func (d *Driver) start(ctx context.Context, ref sandbox.Ref) error {
	data, _, err := d.inspect(ctx, ref.ID)
	if err != nil {
		return err
	}
	if data == nil {
		return d.whyAbsent(ctx, ref.ID)
	}
	switch observation(data.State).State {
	case sandbox.StateRunning:
		return nil
	case sandbox.StateBroken:
		return fmt.Errorf("%w: podman says its container is %s; delete it", sandbox.ErrState, data.State.Status)
	}
	for _, source := range ownSources(data) {
		if err := checkUnmoved(source); err != nil {
			return err
		}
	}
	if err := checkGuestd(d.cfg.GuestdDir); err != nil {
		return err
	}
	if err := makeDir(ref); err != nil {
		return err
	}
	err = d.settle(ctx, startLimit, func(ctx context.Context) error {
		return containers.Start(ctx, data.ID, nil)
	})
	if err == nil || ctx.Err() != nil {
		return err
	}
	// Somebody else may have started, stopped or deleted it meanwhile.
	o, observed := d.observe(ctx, ref.ID)
	switch {
	case observed != nil:
		return err
	case o.State == sandbox.StateRunning:
		return nil
	case o.State == sandbox.StateAbsent || isNotFound(err):
		return sandbox.ErrNotFound
	case o.State == sandbox.StateBroken:
		return fmt.Errorf("%w: %s", sandbox.ErrState, o.Detail)
	case o.State == sandbox.StateExited && o.StartedAt.After(data.State.StartedAt):
		return nil // it ran, and ended at once
	}
	return err
}

// whyAbsent is the error for a sandbox that has no container.
func (d *Driver) whyAbsent(ctx context.Context, id string) error {
	o, err := d.observe(ctx, id)
	switch {
	case err != nil:
		return err
	case o.State == sandbox.StateBroken:
		return fmt.Errorf("%w: %s; delete it", sandbox.ErrState, o.Detail)
	}
	return sandbox.ErrNotFound
}

// Stop implements sandbox.Driver. Podman counts grace in seconds: it is rounded
// up.
func (d *Driver) Stop(ctx context.Context, ref sandbox.Ref, grace time.Duration) error {
	return op("stop", ref.ID, d.stop(ctx, ref, grace))
}

func (d *Driver) stop(ctx context.Context, ref sandbox.Ref, grace time.Duration) error {
	for tries := 1; ; tries++ {
		data, _, err := d.inspect(ctx, ref.ID)
		if err != nil || data == nil || observation(data.State).State != sandbox.StateRunning {
			return err
		}
		seconds := uint(math.Ceil(max(grace, 0).Seconds()))
		err = d.call(ctx, grace+removeLimit, func(ctx context.Context) error {
			if data.State.Paused {
				// It has to run to end by itself.
				if err := containers.Unpause(ctx, data.ID, nil); err != nil {
					return err
				}
			}
			return containers.Stop(ctx, data.ID, new(containers.StopOptions).WithTimeout(seconds))
		})
		if err == nil {
			return nil
		}
		// Of several who stop it, or delete it, some are told that it is not to
		// be stopped any more. Look again.
		var answer *podmanError
		if tries == maxTries || !errors.As(err, &answer) {
			return err
		}
		if paused := pause(ctx, tryPause); paused != nil {
			return paused
		}
	}
}

// When several change the same container at once, Podman tells some that it is
// in no state for it. A moment later it is in another.
const (
	maxTries = 20
	tryPause = 50 * time.Millisecond
)

// Delete implements sandbox.Driver.
func (d *Driver) Delete(ctx context.Context, ref sandbox.Ref) error {
	if sandbox.ValidateName("name", ref.ID) != nil {
		return nil
	}
	found, err := d.artefacts(ctx, ref.ID)
	if err != nil {
		return op("delete", ref.ID, err)
	}
	for _, a := range found {
		if err := d.remove(ctx, a.containerID); err != nil {
			return op("delete", ref.ID, err)
		}
	}
	return op("delete", ref.ID, emptyDir(ref))
}

// remove removes a container, or what is left of one, whatever its state.
//
// It stops it first, and then asks for one that does not run to be removed. If
// Podman is asked for both at once (force) it lets go of the container's lock
// in between, and removes one that was started there again from under its
// processes, which then nobody finds any more.
func (d *Driver) remove(ctx context.Context, containerID string) error {
	err := d.settle(ctx, removeLimit, func(ctx context.Context) error {
		for tries := 1; ; tries++ {
			if err := kill9(ctx, containerID); err != nil && tries == maxTries {
				return err
			}
			options := new(containers.RemoveOptions).WithIgnore(true).WithVolumes(true)
			if tries == maxTries {
				// It is in none of the states that it could be in.
				options = options.WithForce(true).WithTimeout(0)
			}
			_, err := containers.Remove(ctx, containerID, options)
			if err == nil || !isAnswer(err) || isNotFound(translate(err)) || tries == maxTries {
				return err
			}
			if err := pause(ctx, tryPause); err != nil {
				return err
			}
		}
	})
	if isNotFound(err) {
		return nil
	}
	return err
}

// kill9 stops a container at once, if it runs.
func kill9(ctx context.Context, containerID string) error {
	data, err := containers.Inspect(ctx, containerID, nil)
	if err != nil {
		if isNotFound(translate(err)) {
			return nil // or there is only its storage
		}
		return err
	}
	switch {
	case data.State == nil || observation(data.State).State != sandbox.StateRunning:
		return nil
	case data.State.Paused:
		if err := containers.Unpause(ctx, containerID, nil); err != nil {
			return err
		}
	}
	return containers.Stop(ctx, containerID, new(containers.StopOptions).WithTimeout(0).WithIgnore(true))
}
