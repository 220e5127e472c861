package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/qemu"
)

// machines is what the driver of virtual machines has that is this system's own.
func machines(cfg Config, owner string) vm.DriverConfig {
	host := &machineHost{options: qemu.Options{Accelerator: cfg.VM.Accelerator}}
	return vm.DriverConfig{
		Shim: []string{cfg.VM.Accelerator}, Probe: host.probe, KeyDir: keyDir(os.Getenv("XDG_RUNTIME_DIR"), owner),
	}
}

// shimVariables are where programs, temporary files and the user's service
// manager are.
func shimVariables() []string {
	return []string{"PATH", "TMPDIR", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"}
}

// keyDir is where the keys of memories that were saved are: with the host's
// restart, or the end of the user's last session, they go.
func keyDir(runtimeDir, owner string) string {
	if runtimeDir == "" {
		return ""
	}
	return filepath.Join(runtimeDir, "choiros-agent", "keys", owner)
}

// machineHost finds out what this host can do for virtual machines, once that
// it works.
type machineHost struct {
	options qemu.Options

	mu     sync.Mutex
	report *sandbox.Report
}

func (h *machineHost) probe(ctx context.Context) (sandbox.Report, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.report != nil {
		return *h.report, nil
	}
	found, err := qemu.Probe(ctx, h.options)
	if err != nil {
		return sandbox.Report{}, &sandbox.UnavailableError{Err: err, Cure: "see whether QEMU runs at all: qemu-system-x86_64 --version"}
	}
	var missing []error
	var cures []string
	for _, program := range found.Missing {
		missing = append(missing, program)
		cures = append(cures, program.Cure)
	}
	if len(missing) > 0 {
		return sandbox.Report{}, &sandbox.UnavailableError{Err: errors.Join(missing...), Cure: strings.Join(cures, "; ")}
	}
	report := sandbox.Report{Version: fmt.Sprintf("%s with %s",
		strings.Join(slices.Sorted(maps.Values(found.Versions)), ", "), found.Accelerator)}
	if found.Accelerator == qemu.TCG {
		report.Warnings = append(report.Warnings, fmt.Sprintf(
			"virtual machines are emulated, many times slower than with KVM: %s; let this user open /dev/kvm on a host whose processor can", found.WhyNotKVM))
	}
	h.report = &report
	return report, nil
}

// runShim is the hidden command vm-shim: ACCELERATOR FOLDER.
func runShim(args []string, stderr io.Writer) int {
	if len(args) != 2 {
		fmt.Fprintln(stderr, "agent: vm-shim is for the agent itself")
		return exitUsage
	}
	if err := noCoreDumps(); err != nil {
		printErrors(stderr, err)
		return exitFailed
	}
	return vm.RunShim(args[1:], func(ctx context.Context, c vm.Config) (vm.Machine, error) {
		return qemu.New(ctx, c, qemu.Options{Accelerator: args[0], ShareUID: c.ShareUID, ShareGID: c.ShareGID})
	})
}
