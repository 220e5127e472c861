package process

import (
	"context"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// Inspect implements sandbox.Driver.
func (d *Driver) Inspect(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
	o, _, err := d.settled(ctx, ref)
	return o, failed("inspect", ref, err)
}

// settled is observe, but that of a sandbox found broken it waits out whoever
// is making or deleting it just now.
func (d *Driver) settled(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, life, error) {
	b, err := d.box(ref)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return sandbox.Observation{}, life{}, err
	}
	o, l, err := b.observe()
	if err != nil || o.State != sandbox.StateBroken {
		return o, l, err
	}
	m, err := b.lock(ctx)
	if err != nil {
		return sandbox.Observation{}, life{}, err
	}
	defer m.release()
	return b.observe()
}

// Wait implements sandbox.Driver. A wait that does not end costs a goroutine
// and a file descriptor, and no thread.
func (d *Driver) Wait(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
	o, err := d.wait(ctx, ref)
	return o, failed("wait", ref, err)
}

func (d *Driver) wait(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
	b, err := d.box(ref)
	if err != nil {
		return sandbox.Observation{}, err
	}
	for {
		o, l, err := d.settled(ctx, ref)
		if err != nil || o.State != sandbox.StateRunning {
			return o, err
		}
		if err := b.awaitEnd(ctx, l.Number); err != nil {
			return sandbox.Observation{}, err
		}
		if o, ended, err := b.ended(l); ended || err != nil {
			return o, err
		}
		// It left no word. The lock that says whether it lives may be given up
		// a moment after the FIFO is.
		select {
		case <-ctx.Done():
			return sandbox.Observation{}, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}
