//go:build !linux

package process

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

func detached() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }

func confined() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }

func bootID() (string, error) { return "", nil }

func socketPath(dir int, name string) string { return fmt.Sprintf("/dev/fd/%d/%s", dir, name) }

func becomeReaper() error { return nil }

func killDescendants() error { return nil }

func awaitExit(process *os.Process) { _, _ = process.Wait() }

func reap(cmd *exec.Cmd) { go func() { _ = cmd.Wait() }() }

// Processes returns the pids of all processes that live and run for a sandbox
// under the given root.
func Processes(string) ([]int, error) { return nil, errors.ErrUnsupported }
