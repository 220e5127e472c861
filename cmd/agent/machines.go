//go:build linux || darwin

package main

import (
	"cmp"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/choiros/agent/internal/image"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/vm"
)

// addMachines adds the driver of virtual machines. args makes this program a
// shim, before what this system's have.
func addMachines(all map[string]sandbox.Driver, cfg Config, owner string, args ...string) error {
	images, err := image.Open(filepath.Join(cfg.StateDir, "images"))
	if err != nil {
		return err
	}
	kits, err := beside(kitName)
	if err != nil {
		return err
	}
	config := machines(cfg, owner)
	config.Root, config.Arch = filepath.Join(cfg.StateDir, "vm"), runtime.GOARCH
	config.Images, config.Kit = images, guestKit(cfg, kits)
	config.Bundles = cmp.Or(cfg.VM.Bundles, filepath.Join(cfg.StateDir, "bundles"))
	config.Shim = append(args, config.Shim...)
	config.Env = shimEnvironment(os.Environ(), shimVariables())
	driver, err := vm.New(config)
	if err != nil {
		return err
	}
	all["vm"] = driver
	return nil
}

// shimEnvironment is what a shim, and what it starts, is to know of the
// agent's environment, by the names of variables.
func shimEnvironment(all, names []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(variable string) bool {
		name, _, _ := strings.Cut(variable, "=")
		return !slices.Contains(names, name)
	})
}
