package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/choiros/agent/internal/account"
	"github.com/choiros/agent/internal/image"
	"github.com/choiros/agent/internal/sandbox"
)

// What a machine has where its spec says nothing.
const (
	defaultCPUs      = 2
	defaultMemoryMiB = 1024
	defaultDiskMiB   = 16 << 10
	minMemoryMiB     = 128
	minDataDiskMiB   = 48 // what guestd can format; see docs/guest-kit.md
	minDiskMiB       = 64
	maxDiskMiB       = 16 << 20
)

const optionsField = "spec.driver_options"

// options are the spec's driver_options as this driver knows them.
type options struct {
	// Network is "internet" (the default) or "none".
	Network string `json:"network"`
	// DiskMiB bounds what the sandbox may write beside its mounts. It takes
	// that room only as it is used.
	DiskMiB int64 `json:"disk_mib"`
}

const (
	networkInternet = "internet"
	networkNone     = "none"
)

func parseOptions(raw json.RawMessage) (options, error) {
	o := options{Network: networkInternet, DiskMiB: defaultDiskMiB}
	if trimmed := bytes.TrimSpace(raw); len(trimmed) == 0 || bytes.Equal(trimmed, []byte("null")) {
		return o, nil
	}
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&o); err != nil {
		return o, sandbox.Invalidf(optionsField, "%v; this driver knows network and disk_mib", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return o, sandbox.Invalidf(optionsField, "has something behind its end")
	}
	if o.Network != networkInternet && o.Network != networkNone {
		return o, sandbox.Invalidf(optionsField+".network", "%q is neither %s nor %s", o.Network, networkInternet, networkNone)
	}
	if o.DiskMiB < minDiskMiB || o.DiskMiB > maxDiskMiB {
		return o, sandbox.Invalidf(optionsField+".disk_mib", "%d is not from %d to %d", o.DiskMiB, minDiskMiB, maxDiskMiB)
	}
	return o, nil
}

// plan is the record of a sandbox: all that a machine is made from. It has no
// secret.
type plan struct {
	Dir     string // of the Ref
	Spec    sandbox.Spec
	Options options
	Image   *imagePlan `json:",omitempty"`
	Boot    bundle     // of a bundle; an image is booted with the kit of the day
	Shares  []share
	Disks   []disk
	// Owner is whom shares belong to inside: the workload's user.
	Owner account.ID
	// CPUs and MemoryMiB are the machine's size.
	CPUs      int
	MemoryMiB int
}

// imagePlan is what is needed to know of an image.
type imagePlan struct {
	Digest string
	// Arch is the image's; empty, in old records: the machine's.
	Arch string `json:",omitempty"`
	Root string // the file with its file system
	// Command, Env, User and WorkingDir are the workload's, spec and image
	// taken together.
	Command    []string
	Env        map[string]string
	User       string
	WorkingDir string
	StopSignal int32
}

// owner is who the workload runs as, by number.
func (p *imagePlan) owner() (account.ID, error) {
	if id, ok := account.Of(p.User); ok {
		return id, nil
	}
	passwd, group, err := image.Users(p.Root)
	if err != nil {
		return account.ID{}, err
	}
	id, err := account.In(p.User, passwd, group)
	if err != nil {
		return account.ID{}, sandbox.Invalidf("spec.user", "%s: %v", p.User, err)
	}
	return id, nil
}

// share is a folder of the host.
type share struct {
	Tag, Source, Target string
	ReadOnly            bool
}

// disk is a disk image of the host.
type disk struct {
	Serial, Source, Target string
	SizeMiB                uint64
}

// Validate implements sandbox.Validator.
func (d *Driver) Validate(ctx context.Context, spec sandbox.Spec) error {
	_, _, err := d.check(ctx, spec)
	return err
}

// check makes a plan without making anything else. Of an image it says which
// one it is, and not yet where its file system is.
func (d *Driver) check(ctx context.Context, spec sandbox.Spec) (plan, image.Resolved, error) {
	fail := func(err error) (plan, image.Resolved, error) { return plan{}, image.Resolved{}, err }
	opts, err := parseOptions(spec.DriverOptions)
	if err != nil {
		return fail(err)
	}
	p := plan{Spec: spec, Options: opts}
	if err := p.size(spec.Resources); err != nil {
		return fail(err)
	}
	if err := p.mount(spec.Mounts); err != nil {
		return fail(err)
	}
	if opts.Network == networkNone && spec.Egress.Mode != "" && spec.Egress.Mode != sandbox.EgressAllow {
		return fail(sandbox.Invalidf("spec.egress", "there is nothing to reach without a network; spec.driver_options.network is none"))
	}
	if err := d.checkNAT(opts, spec.Egress); err != nil {
		return fail(err)
	}
	if spec.Machine != "" {
		if p.Boot, err = d.machine(spec); err != nil {
			return fail(err)
		}
		// Who a name is, only its disks know: then shares are root's.
		p.Owner, _ = account.Of(spec.User)
		return p, image.Resolved{}, nil
	}
	kit, err := d.kit()
	if err != nil {
		return fail(err)
	}
	resolved, err := d.cfg.Images.Resolve(ctx, spec.Image, d.cfg.Arch, d.others()...)
	if errors.Is(err, sandbox.ErrNotFound) {
		err = &sandbox.FieldError{
			Field:   "spec.image",
			Problem: spec.Image + " is not on this host; get it with agentctl image load or agentctl image pull",
			Err:     sandbox.ErrNotFound,
		}
	}
	if err != nil {
		return fail(err)
	}
	if p.Image, err = planImage(spec, resolved); err == nil && p.Image.rosetta(kit.Arch) {
		if old := kit.checkRosetta(); old != nil {
			err = sandbox.Invalidf("spec.image", "image %s is for linux/%s: %v", spec.Image, p.Image.Arch, old)
		}
	}
	return p, resolved, err
}

// size works out a machine's processors and memory. A processor is the least
// that there is: a share of one counts as a whole.
func (p *plan) size(r sandbox.Resources) error {
	if r.Pids > 0 {
		return sandbox.Unsupportedf("spec.resources.pids", "cannot be enforced in a virtual machine")
	}
	p.CPUs = min(defaultCPUs, runtime.NumCPU())
	if r.CPUMillis > 0 {
		p.CPUs = int(r.CPUMillis+999) / 1000
	}
	if p.CPUs > runtime.NumCPU() {
		return sandbox.Invalidf("spec.resources.cpu_millis", "this host has %d processors", runtime.NumCPU())
	}
	p.MemoryMiB = defaultMemoryMiB
	if r.MemoryMiB > 0 {
		if r.MemoryMiB < minMemoryMiB || r.MemoryMiB > 1<<24 {
			return sandbox.Invalidf("spec.resources.memory_mib", "a virtual machine has at least %d", minMemoryMiB)
		}
		p.MemoryMiB = int(r.MemoryMiB) //nolint:gosec // At most 1<<24.
	}
	return nil
}

// mount plans what a spec mounts. Links are followed here, so that one that
// changes later leads nowhere else.
func (p *plan) mount(mounts []sandbox.Mount) error {
	for i, m := range mounts {
		field := fmt.Sprintf("spec.mounts[%d].source", i)
		if m.Kind == sandbox.MountDisk {
			folder, err := filepath.EvalSymlinks(filepath.Dir(m.Source))
			if err != nil {
				return sandbox.Invalidf(field, "%v", err)
			}
			image := filepath.Join(folder, filepath.Base(m.Source))
			if info, err := os.Lstat(image); err == nil && !info.Mode().IsRegular() {
				return sandbox.Invalidf(field, "%s is not a regular file", m.Source)
			}
			if info, err := os.Stat(image); m.SizeMiB > 0 && m.SizeMiB < minDataDiskMiB && (err != nil || info.Size() < minDataDiskMiB<<20) {
				return sandbox.Invalidf(fmt.Sprintf("spec.mounts[%d].size_mib", i), "a disk of %d MiB is too small to be formatted; give it %d or more", m.SizeMiB, minDataDiskMiB)
			}
			p.Disks = append(p.Disks, disk{fmt.Sprintf("data%d", i), image, m.Target, m.SizeMiB})
			continue
		}
		source, err := filepath.EvalSymlinks(m.Source)
		if err != nil {
			return sandbox.Invalidf(field, "%v", err)
		}
		info, err := os.Stat(source)
		if err != nil {
			return sandbox.Invalidf(field, "%v", err)
		}
		if !info.IsDir() {
			return sandbox.Invalidf(field, "%s is not a folder", m.Source)
		}
		p.Shares = append(p.Shares, share{fmt.Sprintf("share%d", i), source, m.Target, !m.Writable()})
	}
	return nil
}

// machine reads the bundle that a spec names.
func (d *Driver) machine(spec sandbox.Spec) (bundle, error) {
	const field = "spec.machine"
	if err := sandbox.ValidateName(field, spec.Machine); err != nil {
		return bundle{}, err
	}
	dir := filepath.Join(d.cfg.Bundles, spec.Machine)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return bundle{}, &sandbox.FieldError{
			Field:   field,
			Problem: fmt.Sprintf("%s is no bundle in %s (vm.bundles)", spec.Machine, d.cfg.Bundles),
			Err:     sandbox.ErrNotFound,
		}
	}
	b, err := readBundle(dir, d.cfg.Arch)
	if err != nil {
		return bundle{}, sandbox.Invalidf(field, "%v", err)
	}
	if b.Kernel == "" && !d.cfg.Firmware {
		return bundle{}, sandbox.Invalidf(field, "%s names no kernel, and machines here have no firmware that boots disks: name the kernel in it, and the initrd", filepath.Join(dir, bundleFile))
	}
	return b, nil
}

// planImage takes spec and image together, as a container would.
func planImage(spec sandbox.Spec, resolved image.Resolved) (*imagePlan, error) {
	entrypoint, command := resolved.Entrypoint, resolved.Cmd
	if len(spec.Entrypoint) > 0 {
		entrypoint = spec.Entrypoint
	}
	if len(spec.Command) > 0 {
		command = spec.Command
	}
	if len(entrypoint) == 1 && entrypoint[0] == "" {
		entrypoint = nil // how a Dockerfile takes its base image's away
	}
	p := &imagePlan{
		Digest: resolved.Digest, Arch: resolved.Architecture, Command: slices.Concat(entrypoint, command), Env: map[string]string{},
		User: resolved.User, WorkingDir: resolved.WorkingDir, StopSignal: sigTerm,
	}
	if len(p.Command) == 0 {
		return nil, sandbox.Invalidf("spec.command", "the image names no command, so the spec has to")
	}
	for _, variable := range resolved.Env {
		name, value, _ := strings.Cut(variable, "=")
		p.Env[name] = value
	}
	maps.Copy(p.Env, spec.Env)
	if spec.User != "" {
		p.User = spec.User
	}
	if spec.WorkingDir != "" {
		p.WorkingDir = spec.WorkingDir
	}
	if resolved.StopSignal != "" {
		if number, err := sandbox.ParseSignal("image", resolved.StopSignal); err == nil {
			p.StopSignal = number
		}
	}
	return p, nil
}
