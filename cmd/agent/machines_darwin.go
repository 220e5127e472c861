package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/choiros/agent/internal/image"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/vz"
)

// addMachines adds the driver of virtual machines. args makes this program a
// shim.
func addMachines(all map[string]sandbox.Driver, cfg Config, _ string, args ...string) error {
	images, err := image.Open(filepath.Join(cfg.StateDir, "images"))
	if err != nil {
		return err
	}
	kits, err := beside(kitName)
	if err != nil {
		return err
	}
	driver, err := vm.New(vm.DriverConfig{
		Root: filepath.Join(cfg.StateDir, "vm"), Images: images, Kit: guestKit(cfg, kits), Arch: runtime.GOARCH,
		Bundles: cmp.Or(cfg.VM.Bundles, filepath.Join(cfg.StateDir, "bundles")),
		Shim:    args, Env: shimEnvironment(os.Environ()), Probe: probeMachines,
	})
	if err != nil {
		return err
	}
	all["vm"] = driver
	return nil
}

// shimEnvironment is what a shim is to know of the agent's environment: where
// temporary files are.
func shimEnvironment(all []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(variable string) bool {
		name, _, _ := strings.Cut(variable, "=")
		return !slices.Contains([]string{"PATH", "TMPDIR"}, name)
	})
}

// probeMachines finds out what this Mac can do for virtual machines. It is
// asked each time: a program can be signed anew, and macOS updated.
func probeMachines(context.Context) (sandbox.Report, error) {
	found, err := vz.Probe()
	if err != nil {
		if host, ok := errors.AsType[*vz.HostError](err); ok { // whose text has the cure in it
			return sandbox.Report{}, &sandbox.UnavailableError{Err: &vz.HostError{Problem: host.Problem, Err: host.Err}, Cure: host.Cure}
		}
		return sandbox.Report{}, &sandbox.UnavailableError{Err: err}
	}
	report := sandbox.Report{Version: "Virtualization.framework of macOS " + found.Version}
	if !found.SavesStates {
		report.Warnings = append(report.Warnings, "sandboxes cannot be hibernated here: that takes Apple silicon and macOS 14")
	}
	return report, nil
}

// runShim is the hidden command vm-shim: FOLDER.
func runShim(args []string, stderr io.Writer) int {
	if len(args) != 1 {
		fmt.Fprintln(stderr, "agent: vm-shim is for the agent itself")
		return exitUsage
	}
	if err := noCoreDumps(); err != nil {
		printErrors(stderr, err)
		return exitFailed
	}
	return vm.RunShim(args, func(_ context.Context, c vm.Config) (vm.Machine, error) {
		return vz.New(c, vz.Options{Home: args[0]})
	})
}
