package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/vz"
)

// machines is what the driver of virtual machines has that is this system's own.
func machines(cfg Config, _ string) vm.DriverConfig {
	return vm.DriverConfig{Probe: probeMachines, Rosetta: rosettaMissing, Firmware: true, NAT: cfg.VM.Network == networkNAT}
}

// shimVariables are where programs and temporary files are.
func shimVariables() []string { return []string{"PATH", "TMPDIR"} }

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

// rosettaMissing says why machines here have no Rosetta. It is asked each time:
// it can be installed while the agent runs.
func rosettaMissing() error {
	found, err := vz.Probe()
	if err != nil {
		return err
	}
	return found.RosettaMissing
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
