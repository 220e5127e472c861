//go:build linux

package qemu

import (
	"errors"

	"github.com/choiros/agent/internal/vm"
)

// checkKernel looks whether the kernel that QEMU starts is one.
func checkKernel(c vm.Config) error {
	if c.Kernel == "" {
		return errors.New("there is no kernel, and QEMU has no firmware here that boots disks")
	}
	kernel := inDir(c, kernelOf(c))
	if kernelOf(c) != c.Kernel {
		return vm.CheckVmlinux(kernel, c.Arch)
	}
	_, err := vm.ReadKernel(kernel, c.Arch)
	return err
}

// kernelOf is the kernel that QEMU starts.
func kernelOf(c vm.Config) string {
	if c.Arch == "amd64" && c.Vmlinux != "" {
		return c.Vmlinux
	}
	return c.Kernel
}
