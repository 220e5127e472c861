package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/choiros/agent/internal/image"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/shim"
)

// DriverConfig is what a Driver is made of.
type DriverConfig struct {
	// Root is an absolute path: the folder of all artefacts, made when first
	// needed. Drivers with the same root, in whatever process, share sandboxes.
	Root string
	// Images is where images are kept; it outlives the driver.
	Images *image.Store
	// Kit is the folder of the guest kit; it may be missing or wrong, which
	// shows when a machine is wanted.
	Kit string
	// Bundles is the folder of bundles, a folder each, by whose name a spec's
	// machine is one; it may be absent.
	Bundles string
	// Arch is GOARCH of guests.
	Arch string
	// Rosetta says why machines for arm64 cannot run images for amd64 by Rosetta
	// at present, and what mends that; nil, what it returns: they can. It is
	// asked whenever that matters. Nil, the function: no machine here ever can.
	Rosetta func() error
	// Firmware: machines whose bundle names no kernel are booted from their disks
	// by a firmware that they have, EFI.
	Firmware bool
	// NAT gives machines the host's own NAT for a network, from their next boot
	// on: one that keeps no egress policy, so that specs with one are refused.
	NAT bool
	// Shim are the arguments with which this program is a shim; see RunShim.
	// The box's folder comes last.
	Shim []string
	// Env is the environment of shims.
	Env []string
	// KeyDir is a folder on a tmpfs, made when first needed, for the keys of
	// memories that were saved; empty, or on a disk: none can be where the
	// hypervisor does not seal by itself.
	KeyDir string
	// Probe says whether machines work on this host.
	Probe func(ctx context.Context) (sandbox.Report, error)
}

// Driver is a sandbox.Driver, and what else is named below. The zero Driver is
// of no use: see New. Nothing of it has to be closed.
type Driver struct{ cfg DriverConfig }

var (
	_ sandbox.Driver        = (*Driver)(nil)
	_ sandbox.Validator     = (*Driver)(nil)
	_ sandbox.LogSource     = (*Driver)(nil)
	_ sandbox.Resizer       = (*Driver)(nil)
	_ sandbox.ImageStore    = (*Driver)(nil)
	_ sandbox.Pauser        = (*Driver)(nil)
	_ sandbox.Hibernator    = (*Driver)(nil)
	_ sandbox.Snapshotter   = (*Driver)(nil)
	_ sandbox.Console       = (*Driver)(nil)
	_ sandbox.EgressPolicer = (*Driver)(nil)
)

// New returns a Driver. It does no I/O.
func New(cfg DriverConfig) (*Driver, error) {
	if !filepath.IsAbs(cfg.Root) {
		return nil, fmt.Errorf("the folder of virtual machines, %q, is not absolute", cfg.Root)
	}
	return &Driver{cfg: cfg}, nil
}

func (d *Driver) boxes() shim.Boxes { return shim.Boxes{Root: d.cfg.Root} }

// Probe implements sandbox.Driver.
func (d *Driver) Probe(ctx context.Context) (sandbox.Report, error) {
	report, err := d.cfg.Probe(ctx)
	if err != nil {
		return sandbox.Report{}, fmt.Errorf("probe: %w", err)
	}
	kit, err := d.kit()
	if err != nil {
		return sandbox.Report{}, fmt.Errorf("probe: %w", err)
	}
	report.Version += ", guest kernel " + kit.KernelVersion
	d.reportRosetta(&report, kit)
	if d.cfg.NAT {
		report.Warnings = append(report.Warnings, natWarning)
	}
	// Processors and memory are the machine's size. What runs inside is
	// counted by nobody.
	report.Limits = sandbox.Limits{CPU: true, Memory: true}
	return report, nil
}

// List implements sandbox.Driver.
func (d *Driver) List(ctx context.Context) ([]string, error) {
	ids, err := d.boxes().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list: %w", err)
	}
	return ids, nil
}

// LoadImage implements sandbox.ImageStore.
func (d *Driver) LoadImage(ctx context.Context, archive io.Reader) ([]sandbox.Image, error) {
	return d.cfg.Images.LoadImage(ctx, archive, d.others()...)
}

// PullImage implements sandbox.ImageStore.
func (d *Driver) PullImage(ctx context.Context, reference string, progress func(string)) (sandbox.Image, error) {
	return d.cfg.Images.PullImage(ctx, reference, progress, d.others()...)
}

// Images implements sandbox.ImageStore.
func (d *Driver) Images(ctx context.Context) ([]sandbox.Image, error) {
	return d.cfg.Images.Images(ctx)
}

// RemoveImage implements sandbox.ImageStore.
func (d *Driver) RemoveImage(ctx context.Context, reference string) error {
	used, err := d.usedImages(ctx)
	if err != nil {
		return fmt.Errorf("remove image %s: %w", reference, err)
	}
	return d.cfg.Images.RemoveImage(ctx, reference, func(digest string) bool { return used[digest] })
}

// usedImages are the digests of the images that sandboxes were made from.
func (d *Driver) usedImages(ctx context.Context) (map[string]bool, error) {
	ids, err := d.boxes().List(ctx)
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, id := range ids {
		b, err := d.boxes().Box(id)
		if err != nil {
			continue // nothing of ours
		}
		var p plan
		if _, err := b.Made(&p); err != nil {
			return nil, err
		}
		if p.Image != nil {
			used[p.Image.Digest] = true
		}
	}
	return used, nil
}

// failed says which operation failed on which sandbox. The context's own errors
// stay as they are.
func failed(operation string, ref sandbox.Ref, err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%s %s: %w", operation, ref.ID, shim.DiskProblem(err))
}
