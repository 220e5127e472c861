package process

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/shim"
)

const (
	// Name is what specs call this driver.
	Name = "process"
	// Image is the image whose program is the calling binary itself, acting as
	// the commands of test/workload that the driver contract is tested with.
	// Its default command is sleep. Any absolute path of an executable is an
	// image, too.
	Image = "workload"
	// GuestDir is the folder of the guest channel's sockets, PORT.sock, as
	// seen from inside; on the host it is the folder guest in Ref.Dir.
	GuestDir = "/run/guest"
)

// Config is what a Driver is made of.
type Config struct {
	// Root is the folder of all artefacts; made when first needed. Drivers
	// with the same root and owner, in whatever process, share sandboxes.
	Root string
	// Owner is of the form [a-z0-9][a-z0-9-]{0,62}.
	Owner string
	// Limits are what Probe reports. Limits that are not set here are refused
	// in specs; the others are accepted and, this being a fake, not enforced.
	Limits sandbox.Limits
}

// Driver is a sandbox.Driver, Validator, LogSource, Pauser and Console.
type Driver struct {
	cfg     Config
	policed bool // see Policed
}

var (
	_ sandbox.Driver    = (*Driver)(nil)
	_ sandbox.Validator = (*Driver)(nil)
	_ sandbox.LogSource = (*Driver)(nil)
	_ sandbox.Pauser    = (*Driver)(nil)
	_ sandbox.Console   = (*Driver)(nil)
)

// New returns the driver. It touches nothing. It panics if cfg is wrong.
func New(cfg Config) *Driver {
	if err := sandbox.ValidateName("owner", cfg.Owner); err != nil {
		panic(err)
	}
	if !filepath.IsAbs(cfg.Root) {
		panic(fmt.Sprintf("process: root %q is not absolute", cfg.Root))
	}
	return &Driver{cfg: cfg}
}

// Options are the driver options of a spec.
type Options struct {
	// StartDelay is how much longer than needed Start takes, as a Go duration.
	StartDelay string `json:"start_delay,omitempty"`
}

// Spec returns a spec that runs a standard workload.
func Spec(args ...string) sandbox.Spec {
	return sandbox.Spec{Driver: Name, Image: Image, Command: args}
}

// Command returns the command that runs a standard workload inside, for guestd
// to execute. Its arguments are not rewritten: they are paths of the host's.
func Command(args ...string) []string {
	self, err := os.Executable()
	if err != nil {
		self = os.Args[0]
	}
	return append([]string{self, workloadFlag}, args...)
}

// Probe implements sandbox.Driver.
func (d *Driver) Probe(ctx context.Context) (sandbox.Report, error) {
	if err := ctx.Err(); err != nil {
		return sandbox.Report{}, fmt.Errorf("probe: %w", err)
	}
	if err := os.MkdirAll(d.cfg.Root, 0o700); err != nil {
		return sandbox.Report{}, &sandbox.UnavailableError{
			Err:  err,
			Cure: "choose a root folder that can be written",
		}
	}
	return sandbox.Report{Version: "1", Limits: d.cfg.Limits}, nil
}

// List implements sandbox.Driver.
func (d *Driver) List(ctx context.Context) ([]string, error) {
	ids, err := d.boxes().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list: %w", err)
	}
	return ids, nil
}

// Validate implements sandbox.Validator.
func (d *Driver) Validate(_ context.Context, spec sandbox.Spec) error {
	switch limits := d.cfg.Limits; {
	case spec.Machine != "":
		return sandbox.Unsupportedf("spec.machine", "is not possible with driver %s; give spec.image", Name)
	case spec.User != "":
		return sandbox.Unsupportedf("spec.user", "is not possible with driver %s", Name)
	case !spec.Egress.IsZero() && !d.policed:
		return sandbox.Unsupportedf("spec.egress", "cannot be enforced by driver %s", Name)
	case spec.Resources.CPUMillis != 0 && !limits.CPU:
		return sandbox.Unsupportedf("spec.resources.cpu_millis", "cannot be enforced by driver %s", Name)
	case spec.Resources.MemoryMiB != 0 && !limits.Memory:
		return sandbox.Unsupportedf("spec.resources.memory_mib", "cannot be enforced by driver %s", Name)
	case spec.Resources.Pids != 0 && !limits.Pids:
		return sandbox.Unsupportedf("spec.resources.pids", "cannot be enforced by driver %s", Name)
	}
	for i, m := range spec.Mounts {
		if m.Kind == sandbox.MountDisk {
			return sandbox.Unsupportedf(fmt.Sprintf("spec.mounts[%d].kind", i), "disk is not possible with driver %s", Name)
		}
	}
	if spec.Image != Image {
		info, err := os.Stat(spec.Image)
		if err != nil || !filepath.IsAbs(spec.Image) || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
			return &sandbox.FieldError{
				Field:   "spec.image",
				Problem: fmt.Sprintf("%q is neither %q nor the absolute path of an executable", spec.Image, Image),
				Err:     sandbox.ErrNotFound,
			}
		}
	}
	_, err := startDelay(spec.DriverOptions)
	return err
}

// startDelay decodes driver options.
func startDelay(raw json.RawMessage) (time.Duration, error) {
	const field = "spec.driver_options"
	if len(raw) == 0 {
		return 0, nil
	}
	var opts *Options
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&opts); err != nil {
		return 0, sandbox.Invalidf(field, "%v", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) || opts == nil {
		return 0, sandbox.Invalidf(field, "is not one JSON object")
	}
	if opts.StartDelay == "" {
		return 0, nil
	}
	delay, err := time.ParseDuration(opts.StartDelay)
	if err != nil || delay < 0 {
		return 0, sandbox.Invalidf(field+".start_delay", "%q is not a duration such as 200ms", opts.StartDelay)
	}
	return delay, nil
}

// boxes are the sandboxes of this driver's owner.
func (d *Driver) boxes() shim.Boxes { return shim.Boxes{Root: filepath.Join(d.cfg.Root, d.cfg.Owner)} }

// made is what Create writes.
type made struct {
	Dir  string // of the Ref
	Root string
	Spec sandbox.Spec
}
