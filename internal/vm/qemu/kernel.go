//go:build linux

package qemu

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"github.com/choiros/agent/internal/vm"
)

// checkKernel looks whether a kernel has the mark of its format, and is all
// there: QEMU would take anything, and the guest be silent.
func checkKernel(c vm.Config) error {
	offset, mark, form, length := int64(0x202), "HdrS", "a bzImage", bzImageLength // Documentation/arch/x86/boot.rst
	switch {
	case c.Arch == "arm64":
		// It does not say how long its file is.
		offset, mark, form, length = 56, "ARM\x64", "an uncompressed Image", nil // Documentation/arch/arm64/booting.rst
	case c.Vmlinux != "":
		offset, mark, form, length = 0, elf.ELFMAG, "an ELF file", elfLength
	}
	kernel := kernelOf(c)
	file, err := os.Open(inDir(c, kernel))
	if err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	defer file.Close()
	found := make([]byte, len(mark))
	if _, err := file.ReadAt(found, offset); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("kernel: %w", err)
	}
	if !bytes.Equal(found, []byte(mark)) {
		return fmt.Errorf("kernel %s is not %s for %s", kernel, form, c.Arch)
	}
	if length == nil {
		return nil
	}
	info, err := file.Stat()
	if err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	if want, err := length(file); err != nil || info.Size() < want {
		return errors.Join(fmt.Errorf("kernel %s is not all there; make it anew", kernel), err)
	}
	return nil
}

// bzImageLength is how long a bzImage is at least.
func bzImageLength(file io.ReaderAt) (int64, error) {
	const setupSects, syssize = 0x1f1, 0x1f4
	var header [syssize + 4]byte
	if _, err := file.ReadAt(header[:], 0); err != nil {
		return 0, err
	}
	setup := int64(header[setupSects])
	if setup == 0 {
		setup = 4
	}
	return (1+setup)*512 + 16*int64(binary.LittleEndian.Uint32(header[syssize:])), nil
}

// elfLength is how long an ELF file is that has all that is to be loaded.
func elfLength(file io.ReaderAt) (int64, error) {
	kernel, err := elf.NewFile(file)
	if err != nil {
		return 0, err
	}
	defer kernel.Close()
	var end uint64
	for _, p := range kernel.Progs {
		if p.Type == elf.PT_LOAD {
			end = max(end, p.Off+p.Filesz)
		}
	}
	return int64(min(end, math.MaxInt64)), nil //nolint:gosec // It is not greater.
}

// kernelOf is the kernel that QEMU starts.
func kernelOf(c vm.Config) string {
	if c.Arch == "amd64" && c.Vmlinux != "" {
		return c.Vmlinux
	}
	return c.Kernel
}
