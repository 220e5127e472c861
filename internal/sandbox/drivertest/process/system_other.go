//go:build !linux

package process

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

func confined() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }

func socketPath(dir int, name string) string { return fmt.Sprintf("/dev/fd/%d/%s", dir, name) }

func becomeReaper() error { return nil }

func killDescendants() error { return nil }

// halt stops the process group of guestd, which is all that it is known of.
func halt(guestd int) (halted []int, err error) {
	return []int{-guestd}, syscall.Kill(-guestd, syscall.SIGSTOP)
}

func carryOn(halted []int) {
	for _, group := range halted {
		_ = syscall.Kill(group, syscall.SIGCONT)
	}
}

func awaitExit(process *os.Process) { _, _ = process.Wait() }

// Processes returns the pids of all processes that live and run for a sandbox
// under the given root.
func Processes(string) ([]int, error) { return nil, errors.ErrUnsupported }
