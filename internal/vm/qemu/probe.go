//go:build linux

package qemu

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// tinyTimeout is how long the tiny program may take; it takes a tenth of a second.
const tinyTimeout = 5 * time.Second

// Report is what a host has for machines.
type Report struct {
	// Versions by the program's name, as the programs say it themselves.
	Versions map[string]string
	// Accelerator is KVM if a guest runs with it, else TCG. It stays true for
	// as long as the host runs.
	Accelerator string
	// WhyNotKVM is empty if Accelerator is KVM.
	WhyNotKVM string
	// Missing is what is not there. Without QEMU nothing works, without
	// virtiofsd no share.
	Missing []*MissingError
}

// Probe says what this host has for machines of its own architecture. It runs
// the programs, and a guest of a few bytes, which takes half a second.
func Probe(ctx context.Context, o Options) (Report, error) {
	r := Report{Versions: map[string]string{}, Accelerator: TCG}
	path, err := o.qemuPath(runtime.GOARCH)
	if err := r.note(ctx, path, err); err != nil {
		return r, err
	}
	if path != "" {
		if r.Accelerator, r.WhyNotKVM, err = o.accelerator(ctx, path, runtime.GOARCH); err != nil {
			return r, err
		}
	}
	path, err = o.virtiofsdPath()
	return r, r.note(ctx, path, err)
}

// note adds a program, or that it is missing, to the report.
func (r *Report) note(ctx context.Context, path string, err error) error {
	if missing, ok := errors.AsType[*MissingError](err); ok {
		r.Missing = append(r.Missing, missing)
		return nil
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	said, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return fmt.Errorf("%s --version: %w", path, err)
	}
	first, _, _ := strings.Cut(string(said), "\n")
	r.Versions[filepath.Base(path)] = first
	return nil
}

// accelerator resolves Options.Accelerator for guests of an architecture, and
// says why it is not KVM where that was a question.
func (o Options) accelerator(ctx context.Context, qemu, arch string) (name, why string, err error) {
	switch o.Accelerator {
	case KVM:
		return KVM, "", nil
	case TCG:
		return TCG, "it is not wanted", nil
	case "", Auto:
	default:
		return "", "", fmt.Errorf("accelerator %q is not auto, kvm or tcg", o.Accelerator)
	}
	if !nativeKVM(arch) {
		return TCG, arch + " is not this host's architecture", nil
	}
	if err := tryKVM(ctx, qemu, arch); err != nil {
		if ctx.Err() != nil {
			return "", "", err
		}
		return TCG, err.Error(), nil
	}
	return KVM, "", nil
}

// tryKVM runs a program of a few bytes with KVM, on the processor that machines
// get. That /dev/kvm opens says little: below another hypervisor it may fail
// once a guest uses what an ordinary one does.
func tryKVM(ctx context.Context, qemu, arch string) error {
	device, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	device.Close()
	return runTiny(ctx, qemu, arch, KVM)
}

// tinyAMD64 is testdata/tiny/amd64.S: it goes through protected to 64-bit mode
// with paging, and ends QEMU with status 33 by its debug-exit device.
//
//go:embed testdata/tiny/amd64.bin
var tinyAMD64 []byte

// tinyARM64 is testdata/tiny/arm64.S: it turns the machine off through PSCI.
//
//go:embed testdata/tiny/arm64.bin
var tinyARM64 []byte

// tinyROM is the firmware that runs the tiny program at once, and the status
// that QEMU then ends with.
func tinyROM(arch string) (rom []byte, status int) {
	if arch == "arm64" {
		return tinyARM64, 0
	}
	rom = make([]byte, 64<<10)
	copy(rom, tinyAMD64)
	copy(rom[len(rom)-16:], "\xea\x00\x00\x00\xf0") // the reset vector: jmp 0xf000:0
	return rom, 33
}

// runTiny runs the tiny program and is nil if it came to its end.
func runTiny(ctx context.Context, qemu, arch, accelerator string) error {
	dir, err := os.MkdirTemp("", "tiny-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }() // in the folder for such things
	rom, status := tinyROM(arch)
	if err := os.WriteFile(filepath.Join(dir, "rom"), rom, 0o600); err != nil {
		return err
	}
	args := append(machineArgs(arch, accelerator), "-m", "16", "-bios", "rom")
	if arch == "amd64" {
		args = append(args, "-device", "isa-debug-exit,iobase=0xf4,iosize=4")
	}
	ctx, cancel := context.WithTimeout(ctx, tinyTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, qemu, args...)
	cmd.Dir = dir
	// The kernel kills it with the thread that started it: this one.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	said, err := cmd.CombinedOutput()
	runtime.UnlockOSThread()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("a tiny guest did not come to its end: %w", ctx.Err())
	case cmd.ProcessState != nil && cmd.ProcessState.ExitCode() == status:
		return nil
	case err == nil:
		return errors.New("a tiny guest ended early")
	}
	var last tail
	_, _ = last.Write(said)
	return fmt.Errorf("a tiny guest failed: %w: %s", err, last.String())
}
