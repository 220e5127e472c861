//go:build !linux

package shim

import (
	"os"
	"os/exec"
	"syscall"
)

func self() (string, error) { return os.Executable() }

func detached() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }

// BootID tells this boot of the host from every other.
func BootID() (string, error) { return syscall.Sysctl("kern.bootsessionuuid") }

func reap(cmd *exec.Cmd) { go func() { _ = cmd.Wait() }() }

// leaveService does nothing: launchd ends what is in its job's process group
// (AbandonProcessGroup in launchd.plist(5)), and a shim has a session of its own.
func leaveService(string) error { return nil }
