package vm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/shim"
)

// mutate does something with the right to change a sandbox.
func (d *Driver) mutate(ctx context.Context, ref sandbox.Ref, change func(shim.Box, *shim.Mutex) error) error {
	b, err := d.boxes().Box(ref.ID)
	if err != nil {
		return err
	}
	m, err := b.Lock(ctx)
	if err != nil {
		return err
	}
	defer m.Release()
	return change(b, m)
}

// Create implements sandbox.Driver.
func (d *Driver) Create(ctx context.Context, ref sandbox.Ref, spec sandbox.Spec) error {
	return failed("create", ref, d.mutate(ctx, ref, func(b shim.Box, m *shim.Mutex) error {
		o, _, err := b.Observe()
		switch {
		case err != nil:
			return err
		case o.State != sandbox.StateAbsent && o.State != sandbox.StateBroken:
			return nil
		}
		p, resolved, err := d.check(ctx, spec)
		if err != nil {
			return err
		}
		p.Dir = ref.Dir
		if p.Image != nil {
			if p.Image.Root, err = d.cfg.Images.Root(ctx, resolved.Digest, nil); err != nil {
				return err
			}
			if p.Owner, err = p.Image.owner(); err != nil {
				return err
			}
		}
		return m.Make(p, func() error { return p.makeDisks(ctx, b) })
	}))
}

// makeDisks makes the disks that are this sandbox's alone.
func (p plan) makeDisks(ctx context.Context, b shim.Box) error {
	if p.Image != nil {
		layer, err := os.OpenFile(b.Path(layerFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		// A hole: it takes room only as it is written to.
		return errors.Join(layer.Truncate(p.Options.DiskMiB<<20), layer.Close())
	}
	for _, disk := range p.Boot.Disks {
		if disk.Writable {
			if err := replaceWithCopy(ctx, disk.path(b), disk.File); err != nil {
				return err
			}
		}
	}
	return nil
}

// Start implements sandbox.Driver.
func (d *Driver) Start(ctx context.Context, ref sandbox.Ref) error {
	return failed("start", ref, d.mutate(ctx, ref, func(b shim.Box, m *shim.Mutex) error {
		o, _, err := b.Observe()
		if err != nil || o.State == sandbox.StateRunning {
			return err
		}
		if o.State == sandbox.StateCreated || o.State == sandbox.StateExited {
			if err := d.prepare(b); err != nil {
				return err
			}
		}
		return m.Start(ctx, shim.Program{Args: d.cfg.Shim, Env: d.cfg.Env})
	}))
}

// prepare writes down what is booted: of an image, today's kit.
func (d *Driver) prepare(b shim.Box) error {
	var p plan
	if _, err := b.Made(&p); err != nil {
		return err
	}
	if err := d.checkNAT(p.Options, p.Spec.Egress); err != nil { // it was made when there was another network
		return err
	}
	boot := booted{p.Boot, d.nat(p.Options)}
	if p.Image != nil {
		var err error
		if boot.bundle, err = d.kit(); err != nil {
			return err
		}
		if p.Image.rosetta(boot.Arch) {
			if err := d.checkRosetta(boot.bundle); err != nil {
				return &sandbox.UnavailableError{Err: fmt.Errorf("image %s is for linux/%s: %w", p.Spec.Image, p.Image.Arch, err)}
			}
		}
	}
	return b.Save(bootRecord, boot)
}

// Stop implements sandbox.Driver.
func (d *Driver) Stop(ctx context.Context, ref sandbox.Ref, grace time.Duration) error {
	b, err := d.boxes().Box(ref.ID)
	if err == nil {
		if err = b.Stop(ctx, grace); err == nil {
			err = d.discard(b)
		}
	}
	return failed("stop", ref, err)
}

// Inspect implements sandbox.Driver.
func (d *Driver) Inspect(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
	b, err := d.boxes().Box(ref.ID)
	if err != nil {
		return sandbox.Observation{}, failed("inspect", ref, err)
	}
	o, _, err := b.Settled(ctx)
	return withSaved(b, o), failed("inspect", ref, err)
}

// Wait implements sandbox.Driver.
func (d *Driver) Wait(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
	b, err := d.boxes().Box(ref.ID)
	if err != nil {
		return sandbox.Observation{}, failed("wait", ref, err)
	}
	o, err := b.Wait(ctx)
	return withSaved(b, o), failed("wait", ref, err)
}

// withSaved adds to what was seen of a sandbox whether its memory was saved.
func withSaved(b shim.Box, o sandbox.Observation) sandbox.Observation {
	if o.State == sandbox.StateExited {
		_, o.Saved, _ = readSaved(b) // a record that cannot be read is no use
	}
	return o
}

// Delete implements sandbox.Driver.
func (d *Driver) Delete(ctx context.Context, ref sandbox.Ref) error {
	return failed("delete", ref, d.mutate(ctx, ref, func(b shim.Box, m *shim.Mutex) error {
		if err := m.End(ctx); err != nil {
			return err
		}
		if err := d.discard(b); err != nil {
			return err
		}
		_, err := m.Unmake()
		return err
	}))
}

// Resize implements sandbox.Resizer. The machine has its new size from its
// next start on.
func (d *Driver) Resize(ctx context.Context, ref sandbox.Ref, limits sandbox.Resources) error {
	return failed("resize", ref, d.mutate(ctx, ref, func(b shim.Box, m *shim.Mutex) error {
		var p plan
		found, err := b.Made(&p)
		if err != nil {
			return err
		}
		if !found {
			return sandbox.ErrNotFound
		}
		if err := p.size(limits); err != nil {
			return err
		}
		p.Spec.Resources = limits
		return m.Remake(p)
	}))
}

// Logs implements sandbox.LogSource.
func (d *Driver) Logs(ctx context.Context, ref sandbox.Ref, opts sandbox.LogOptions, yield func(sandbox.LogEntry) error) error {
	b, err := d.boxes().Box(ref.ID)
	if err == nil {
		err = b.Logs(ctx, opts, yield)
	}
	return failed("logs", ref, err)
}

// Dial implements sandbox.Driver.
func (d *Driver) Dial(ctx context.Context, ref sandbox.Ref, port uint32) (net.Conn, error) {
	conn, err := d.dial(ctx, ref, port)
	if err != nil {
		return nil, failed("dial", ref, fmt.Errorf("port %d: %w", port, err))
	}
	return conn, nil
}

func (d *Driver) dial(ctx context.Context, ref sandbox.Ref, port uint32) (net.Conn, error) {
	b, err := d.boxes().Box(ref.ID)
	if err != nil {
		return nil, err
	}
	conn, passed, err := tell(ctx, b, order{Op: opDial, Port: port})
	if err != nil {
		return nil, err
	}
	conn.Close()
	if passed == nil {
		return nil, errors.New("no connection came with the answer")
	}
	return passed, nil
}

// Pause implements sandbox.Pauser.
func (d *Driver) Pause(ctx context.Context, ref sandbox.Ref) error {
	return failed("pause", ref, d.order(ctx, ref, order{Op: opPause}, nil))
}

// Resume implements sandbox.Pauser.
func (d *Driver) Resume(ctx context.Context, ref sandbox.Ref) error {
	return failed("resume", ref, d.order(ctx, ref, order{Op: opResume}, nil))
}

// EgressRefused implements sandbox.EgressPolicer.
func (d *Driver) EgressRefused(ctx context.Context, ref sandbox.Ref) ([]sandbox.Refusal, uint64, error) {
	var found refused
	err := d.order(ctx, ref, order{Op: opRefused}, &found)
	return found.Recent, found.Total, failed("ask what was refused to", ref, err)
}

// order gives the shim of a sandbox that runs an order.
func (d *Driver) order(ctx context.Context, ref sandbox.Ref, o order, result any) error {
	b, err := d.boxes().Box(ref.ID)
	if err != nil {
		return err
	}
	seen, _, err := b.Settled(ctx)
	switch {
	case err != nil:
		return err
	case seen.State == sandbox.StateAbsent:
		return sandbox.ErrNotFound
	case seen.State != sandbox.StateRunning:
		return fmt.Errorf("%w: it does not run", sandbox.ErrState)
	}
	return give(ctx, b, o, result)
}

// SetEgress implements sandbox.EgressPolicer.
func (d *Driver) SetEgress(ctx context.Context, ref sandbox.Ref, egress sandbox.Egress) error {
	return failed("set the egress of", ref, d.mutate(ctx, ref, func(b shim.Box, m *shim.Mutex) error {
		var p plan
		found, err := b.Made(&p)
		if err != nil {
			return err
		}
		if !found {
			return sandbox.ErrNotFound
		}
		if err := d.checkNAT(p.Options, egress); err != nil {
			return err
		}
		p.Spec.Egress = egress
		if err := m.Remake(p); err != nil {
			return err
		}
		o, _, err := b.Observe()
		if err != nil || o.State != sandbox.StateRunning {
			return err
		}
		return give(ctx, b, order{Op: opSetEgress, Egress: &egress}, nil)
	}))
}

// Console implements sandbox.Console.
func (d *Driver) Console(ctx context.Context, ref sandbox.Ref) (net.Conn, error) {
	b, err := d.boxes().Box(ref.ID)
	if err != nil {
		return nil, failed("open the console of", ref, err)
	}
	conn, _, err := tell(ctx, b, order{Op: opConsole})
	if err != nil {
		return nil, failed("open the console of", ref, err)
	}
	return conn, nil
}
