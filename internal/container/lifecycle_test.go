package container

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/containers/podman/v5/pkg/bindings/containers"
	"github.com/containers/podman/v5/pkg/specgen"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/test/image"
)

// foreign makes and starts a container that only has the name of one of ours.
func foreign(t *testing.T, d *Driver, name string, labels map[string]string) {
	t.Helper()
	spec := specgen.NewSpecGenerator(image.RootName, false)
	spec.Name, spec.Labels = name, labels
	spec.NetNS = specgen.Namespace{NSMode: specgen.NoNetwork}
	err := d.call(t.Context(), time.Minute, func(ctx context.Context) error {
		if _, err := containers.CreateWithSpec(ctx, spec, nil); err != nil {
			return err
		}
		return containers.Start(ctx, name, nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := d.call(context.Background(), time.Minute, func(ctx context.Context) error {
			_, err := containers.Remove(ctx, name, new(containers.RemoveOptions).WithForce(true).WithTimeout(0))
			return err
		})
		if err != nil {
			t.Errorf("the foreign container was touched: %v", err)
		}
	})
}

func TestForeignContainersAreLeftAlone(t *testing.T) {
	t.Parallel()
	d := backend(t)
	for id, labels := range map[string]map[string]string{
		"bare":    nil,
		"others":  {labelOwner: newOwner(), labelSandbox: "others"},
		"renamed": {labelOwner: d.cfg.Owner, labelSandbox: "another"},
		"partial": {labelOwner: d.cfg.Owner},
	} {
		name := d.name(id)
		foreign(t, d, name, labels)
		ref := sandbox.Ref{ID: id, Dir: t.TempDir()}
		if o, err := d.Inspect(t.Context(), ref); err != nil || o.State != sandbox.StateAbsent {
			t.Errorf("%s: Inspect: %+v, %v", id, o, err)
		}
		if o, err := d.Wait(t.Context(), ref); err != nil || o.State != sandbox.StateAbsent {
			t.Errorf("%s: Wait: %+v, %v", id, o, err)
		}
		if ids, err := d.List(t.Context()); err != nil || len(ids) > 0 {
			t.Errorf("%s: List: %q, %v", id, ids, err)
		}
		if err := d.Create(t.Context(), ref, program(image.RootName, "sleep")); !errors.Is(err, sandbox.ErrExists) {
			t.Errorf("%s: Create: %v, want that it exists", id, err)
		}
		if err := d.Start(t.Context(), ref); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("%s: Start: %v", id, err)
		}
		if err := d.Stop(t.Context(), ref, 0); err != nil {
			t.Errorf("%s: Stop: %v", id, err)
		}
		if err := d.Delete(t.Context(), ref); err != nil {
			t.Errorf("%s: Delete: %v", id, err)
		}
		if err := d.Logs(t.Context(), ref, sandbox.LogOptions{Stdout: true}, nil); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("%s: Logs: %v", id, err)
		}
		if err := d.Resize(t.Context(), ref, sandbox.Resources{}); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("%s: Resize: %v", id, err)
		}
		var running bool
		err := d.call(t.Context(), time.Minute, func(ctx context.Context) error {
			data, err := containers.Inspect(ctx, name, nil)
			running = err == nil && data.State.Running
			return err
		})
		if err != nil || !running {
			t.Errorf("%s: it does not run any more: %v", id, err)
		}
	}
}

func TestShortGraceIsRoundedUp(t *testing.T) {
	t.Parallel()
	d := backend(t)
	b := newBox(t, d)
	b.start(program(image.RootName, "sleep"))
	// It ends by itself when asked, if it is asked and not killed.
	eventually(t, "it handles signals", func() bool {
		return strings.Contains(b.printed(false), "ready")
	})
	b.must("Stop", d.Stop(t.Context(), b.ref, time.Millisecond))
	if o, err := d.Inspect(t.Context(), b.ref); err != nil || o.ExitCode != 0 {
		t.Errorf("it ended with %+v, %v; want that it was asked to", o, err)
	}
}

func TestLimitsThatCannotBeEnforcedAreRefused(t *testing.T) {
	t.Parallel()
	d := backend(t)
	report, err := d.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for field, test := range map[string]struct {
		resources sandbox.Resources
		enforced  bool
	}{
		"spec.resources.cpu_millis": {sandbox.Resources{CPUMillis: 500}, report.Limits.CPU},
		"spec.resources.memory_mib": {sandbox.Resources{MemoryMiB: 64}, report.Limits.Memory},
		"spec.resources.pids":       {sandbox.Resources{Pids: 50}, report.Limits.Pids},
	} {
		b := newBox(t, d)
		spec := program(image.RootName, "limits")
		spec.Resources = test.resources
		errs := map[string]error{
			"Validate": d.Validate(t.Context(), spec),
			"Create":   d.Create(t.Context(), b.ref, spec),
		}
		for verb, err := range errs {
			var wrong *sandbox.FieldError
			refused := errors.As(err, &wrong) && wrong.Field == field && errors.Is(err, sandbox.ErrUnsupported)
			if refused == test.enforced || refused != (err != nil) {
				t.Errorf("%s of %s: %v; it can be enforced: %v", verb, field, err, test.enforced)
			}
		}
	}
}

// BenchmarkStart is Create and Start, next to podman run -d of the same image
// with the same confinement.
func BenchmarkStart(b *testing.B) {
	d := open(b, newOwner())
	requirePodman(b, d)
	data := b.TempDir()
	spec := program(image.RootName, "sleep")
	spec.Mounts = []sandbox.Mount{{Kind: sandbox.MountData, Source: data, Target: "/data"}}
	for name, img := range map[string]string{"root": image.RootName, "user": image.UserName} {
		spec.Image = img
		b.Run("driver/"+name, func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				ref := sandbox.Ref{ID: "bench", Dir: b.TempDir()}
				b.StartTimer()
				if err := errors.Join(d.Create(b.Context(), ref, spec), d.Start(b.Context(), ref)); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := d.Delete(b.Context(), ref); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
		b.Run("podman-run/"+name, func(b *testing.B) {
			if _, err := exec.LookPath("podman"); err != nil {
				b.Skip("the podman command is not installed")
			}
			container := "bench-" + newOwner()
			userns := "--userns=host"
			if name == "user" {
				userns = "--userns=keep-id:uid=1000,gid=1000"
			}
			for b.Loop() {
				out, err := exec.CommandContext(b.Context(), "podman", "run", "-d", "--name", container, "--cap-drop=ALL", userns,
					"--security-opt=no-new-privileges", "--log-driver=k8s-file", "-v", data+":/data", img, "sleep").CombinedOutput()
				if err != nil {
					b.Fatalf("%v: %s", err, out)
				}
				b.StopTimer()
				if out, err := exec.CommandContext(b.Context(), "podman", "rm", "-f", "-t", "0", container).CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, out)
				}
				b.StartTimer()
			}
		})
	}
}

func BenchmarkInspect(b *testing.B) {
	d := open(b, newOwner())
	requirePodman(b, d)
	ref := sandbox.Ref{ID: "bench", Dir: b.TempDir()}
	if err := errors.Join(d.Create(b.Context(), ref, program(image.RootName, "sleep")), d.Start(b.Context(), ref)); err != nil {
		b.Fatal(err)
	}
	defer func() { _ = d.Delete(context.Background(), ref) }()
	for name, call := range map[string]func() error{
		"Inspect": func() error { _, err := d.Inspect(b.Context(), ref); return err },
		"List":    func() error { _, err := d.List(b.Context()); return err },
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if err := call(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
