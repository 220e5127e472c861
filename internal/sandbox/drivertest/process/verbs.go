package process

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/shim"
)

// failed says which operation failed on which sandbox.
func failed(operation string, ref sandbox.Ref, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", operation, ref.ID, err)
}

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
		if !filepath.IsAbs(ref.Dir) {
			return fmt.Errorf("folder %q is not absolute", ref.Dir)
		}
		o, _, err := b.Observe()
		switch {
		case err != nil:
			return err
		case o.State != sandbox.StateAbsent && o.State != sandbox.StateBroken:
			return nil
		}
		if err := d.Validate(ctx, spec); err != nil {
			return err
		}
		return m.Make(made{Dir: ref.Dir, Root: d.cfg.Root, Spec: spec}, nil)
	}))
}

// Start implements sandbox.Driver.
func (d *Driver) Start(ctx context.Context, ref sandbox.Ref) error {
	return failed("start", ref, d.mutate(ctx, ref, func(_ shim.Box, m *shim.Mutex) error {
		return m.Start(ctx, d.shim())
	}))
}

// Stop implements sandbox.Driver.
func (d *Driver) Stop(ctx context.Context, ref sandbox.Ref, grace time.Duration) error {
	b, err := d.boxes().Box(ref.ID)
	if err == nil {
		err = b.Stop(ctx, grace)
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
	if o.State == sandbox.StateRunning {
		_, absent := os.Stat(b.Path(pausedFile))
		o.Paused = absent == nil
	}
	return o, failed("inspect", ref, err)
}

// Wait implements sandbox.Driver.
func (d *Driver) Wait(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
	b, err := d.boxes().Box(ref.ID)
	if err != nil {
		return sandbox.Observation{}, failed("wait", ref, err)
	}
	o, err := b.Wait(ctx)
	return o, failed("wait", ref, err)
}

// Delete implements sandbox.Driver.
func (d *Driver) Delete(ctx context.Context, ref sandbox.Ref) error {
	return failed("delete", ref, d.mutate(ctx, ref, func(b shim.Box, m *shim.Mutex) error {
		if err := m.End(ctx); err != nil {
			return err
		}
		dirs := []string{ref.Dir}
		var asked made
		if found, err := b.Made(&asked); err == nil && found && asked.Dir != ref.Dir {
			dirs = append(dirs, asked.Dir)
		}
		for _, dir := range dirs {
			if filepath.IsAbs(dir) {
				if err := os.RemoveAll(filepath.Join(dir, "guest")); err != nil {
					return err
				}
			}
		}
		faults, err := m.Unmake()
		if err == nil && len(faults) > 0 {
			err = fmt.Errorf("it is deleted, but its shim had a fault: %s", faults)
		}
		return err
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
