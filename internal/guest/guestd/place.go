//go:build linux

package guestd

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/machine"
)

// settle makes a machine the workload's place: its user, its environment, its
// working directory and a place for its secrets. ownRoot: guestd made the root,
// and there is nothing in it that somebody else sees to.
func (w *workload) settle(plan *guestv1.Workload, ownRoot bool) error {
	who, err := find(plan.GetUser())
	if err != nil {
		return err
	}
	set, err := environmentOf(plan.GetEnv())
	if err != nil {
		return err
	}
	env := merge(w.environment(), set)
	// As Podman has it, so that an image finds the same.
	if variable(env, "PATH") == "" {
		env = merge(env, []string{"PATH=" + defaultPath})
	}
	if variable(env, "HOME") == "" {
		env = merge(env, []string{"HOME=" + who.home})
	}
	if err := w.work(plan.GetWorkingDir(), who); err != nil {
		return err
	}
	if _, err := os.Stat(w.secretsDir); ownRoot || errors.Is(err, os.ErrNotExist) {
		if err := machine.Secrets(w.secretsDir, who.uid, who.gid); err != nil {
			return err
		}
	}
	if len(w.command) == 0 {
		w.command = plan.GetCommand()
	}
	w.account = &who
	w.mu.Lock()
	defer w.mu.Unlock()
	w.env = env
	return nil
}

// work goes to the working directory, from where all that is started begins.
// One that is absent is made, and the workload's user's.
func (w *workload) work(dir string, who account) error {
	if dir == "" {
		dir = "/"
	}
	_, err := os.Stat(dir)
	absent := errors.Is(err, os.ErrNotExist)
	if absent {
		err = os.MkdirAll(dir, 0o755)
	}
	if err == nil && absent {
		err = os.Chown(dir, int(who.uid), int(who.gid))
	}
	if err == nil {
		err = os.Chdir(dir)
	}
	if err != nil {
		return fmt.Errorf("working directory %s: %w", dir, err)
	}
	w.dir = dir
	return nil
}

// endedBy is how a machine ends that gets a signal while no process of the
// workload's is there: as if that had ended it, unless it is the system itself,
// which ends well.
func (w *workload) endedBy(number syscall.Signal) int {
	if phase, _ := w.state(); w.system && phase == guestv1.Greeting_PHASE_RUNNING {
		return 0
	}
	return exitSignalBase + int(number)
}
