//go:build !linux

package process

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

func detached() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }

func confined() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }

func bootID() (string, error) { return "", nil }

func socketPath(dir *os.File, name string) string { return filepath.Join(dir.Name(), name) }

func awaitExit(process *os.Process) { _, _ = process.Wait() }

func reap(cmd *exec.Cmd) { go func() { _ = cmd.Wait() }() }

// Processes returns the pids of all processes that live and run for a sandbox
// under the given root.
func Processes(string) ([]int, error) { return nil, errors.ErrUnsupported }
