package container

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/containers/podman/v5/libpod/define"
	"github.com/containers/podman/v5/pkg/bindings/containers"
	"github.com/containers/podman/v5/pkg/domain/entities/types"

	"github.com/choiros/agent/internal/sandbox"
)

// stateStorage is what Podman calls a container of which there is only the
// storage: one that it was killed over while making.
const stateStorage = "storage"

// artefact is one thing of Podman's that belongs to a sandbox of ours.
type artefact struct {
	containerID string
	sandboxID   string
	state       string // as Podman says it
	pid         int    // zero: not known
	lookup      bool   // one in which the image is read
	whole       bool   // the sandbox's container, and not a half or a lookup
}

// artefacts lists what there is of one sandbox, or of all if id is empty.
func (d *Driver) artefacts(ctx context.Context, id string) ([]artefact, error) {
	pattern := "^" + regexp.QuoteMeta(d.prefix())
	if id != "" {
		pattern = "^" + regexp.QuoteMeta(d.name(id)) + "(" + regexp.QuoteMeta(lookupMark) + ".*)?$"
	}
	options := new(containers.ListOptions).WithAll(true).WithExternal(true).
		WithFilters(map[string][]string{"name": {pattern}})
	var list []types.ListContainer
	err := d.call(ctx, readLimit, func(ctx context.Context) (err error) {
		list, err = containers.List(ctx, options)
		return err
	})
	if err != nil {
		return nil, err
	}
	var found []artefact
	for i := range list {
		if a, ok := d.recognise(&list[i]); ok && (id == "" || a.sandboxID == id) {
			found = append(found, a)
		}
	}
	return found, nil
}

// recognise returns what of ours a listed container is, if it is.
func (d *Driver) recognise(c *types.ListContainer) (artefact, bool) {
	for _, name := range c.Names {
		id, lookup, ok := d.ours(name, c.Labels)
		half := c.State == stateStorage
		if half {
			// It has no labels yet, and nobody else gives such names.
			id, lookup, ok = d.sandboxOf(name)
		}
		if ok {
			return artefact{containerID: c.ID, sandboxID: id, state: c.State, pid: c.Pid, lookup: lookup, whole: !half && !lookup}, true
		}
	}
	return artefact{}, false
}

// List implements sandbox.Driver.
func (d *Driver) List(ctx context.Context) ([]string, error) {
	found, err := d.artefacts(ctx, "")
	if err != nil {
		return nil, err
	}
	ids := make([]string, 0, len(found))
	for _, a := range found {
		ids = append(ids, a.sandboxID)
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// inspect returns what Podman knows of a sandbox's container, or nil if there
// is none. foreign says that there is one of its name that is not ours.
func (d *Driver) inspect(ctx context.Context, id string) (data *define.InspectContainerData, foreign bool, err error) {
	if sandbox.ValidateName("id", id) != nil {
		return nil, false, nil
	}
	name := d.name(id)
	look := func() error {
		return d.call(ctx, readLimit, func(ctx context.Context) (err error) {
			data, err = containers.Inspect(ctx, name, nil)
			return err
		})
	}
	err = look()
	if err == nil && d.isAbandoned(data) {
		// Stopping what is dead has Podman write down that it is.
		containerID := data.ID
		_ = d.settle(ctx, removeLimit, func(ctx context.Context) error {
			return containers.Stop(ctx, containerID, new(containers.StopOptions).WithTimeout(0))
		})
		err = look()
	}
	if isNotFound(err) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	if data.Config == nil || data.State == nil || data.Name != name {
		return nil, true, nil
	}
	if got, _, ok := d.ours(data.Name, data.Config.Labels); !ok || got != id {
		return nil, true, nil
	}
	return data, false, nil
}

// isAbandoned reports whether a container of ours ended and nobody noticed: its
// monitor was killed too. Podman then says for ever that it runs.
func (d *Driver) isAbandoned(data *define.InspectContainerData) bool {
	conn := d.conn.Load()
	if conn == nil || !conn.sees || data.State == nil || data.Config == nil {
		return false
	}
	_, _, ours := d.ours(data.Name, data.Config.Labels)
	return ours && data.State.Status == define.ContainerStateRunning.String() &&
		isGone(data.State.Pid) && isGone(data.State.ConmonPid)
}

// Inspect implements sandbox.Driver.
func (d *Driver) Inspect(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
	o, err := d.observe(ctx, ref.ID)
	return withOOM(ref, o), op("inspect", ref.ID, err)
}

// withOOM adds to what Podman says of an end what guestd has left a word of: that
// it was for want of memory, which Podman may have come too late to see. The
// word is the guest's, and of its own end.
func withOOM(ref sandbox.Ref, o sandbox.Observation) sandbox.Observation {
	if o.State == sandbox.StateExited && o.ExitCode == 128+9 && !o.OOMKilled {
		_, err := os.Lstat(filepath.Join(guestDir(ref), "oom"))
		o.OOMKilled = err == nil
	}
	return o
}

func (d *Driver) observe(ctx context.Context, id string) (sandbox.Observation, error) {
	data, foreign, err := d.inspect(ctx, id)
	if err != nil {
		return sandbox.Observation{}, err
	}
	if data != nil {
		return observation(data.State), nil
	}
	absent := sandbox.Observation{State: sandbox.StateAbsent}
	if foreign || sandbox.ValidateName("id", id) != nil {
		return absent, nil
	}
	left, err := d.artefacts(ctx, id)
	if err != nil {
		return sandbox.Observation{}, err
	}
	for _, a := range left {
		if a.whole {
			// It was made between the two looks.
			return d.observe(ctx, id)
		}
	}
	if len(left) > 0 {
		return sandbox.Observation{State: sandbox.StateBroken, Detail: "podman did not finish making its container"}, nil
	}
	return absent, nil
}

// observation translates the state of a container.
func observation(state *define.InspectContainerState) sandbox.Observation {
	o := sandbox.Observation{StartedAt: state.StartedAt}
	switch state.Status {
	case define.ContainerStateConfigured.String(), define.ContainerStateCreated.String():
		// Made, perhaps also in the runtime, and not started.
		return sandbox.Observation{State: sandbox.StateCreated}
	case define.ContainerStateRunning.String(), define.ContainerStateStopping.String():
		o.State = sandbox.StateRunning
	case define.ContainerStatePaused.String():
		o.State, o.Detail = sandbox.StateRunning, "paused"
	case define.ContainerStateStopped.String(), define.ContainerStateExited.String():
		if state.StartedAt.IsZero() {
			return sandbox.Observation{State: sandbox.StateCreated}
		}
		o.State = sandbox.StateExited
		o.FinishedAt, o.ExitCode, o.OOMKilled = state.FinishedAt, int(state.ExitCode), state.OOMKilled
		if o.FinishedAt.Before(o.StartedAt) {
			// Podman takes the two times from different clocks: its own, once
			// the runtime has answered, and that of conmon's exit file.
			o.FinishedAt = o.StartedAt
		}
		if o.ExitCode < 0 {
			// The host or conmon went down with it.
			o.ExitCode, o.Detail = 128+9, "its end was not recorded"
		}
	default:
		o.State, o.Detail = sandbox.StateBroken, "podman says its container is "+state.Status
	}
	return o
}
