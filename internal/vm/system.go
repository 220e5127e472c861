package vm

import (
	"context"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/shim"
)

// systemOffLimit is how long a system of its own, which nobody has asked to
// stop, may take to switch itself off: systemd gives each of its units 90 s.
const systemOffLimit = 3 * time.Minute

const (
	// pressLimit is how long a hypervisor may take to press the power button.
	pressLimit = 5 * time.Second
	// pressAgain is after how long it is pressed once more.
	pressAgain = 10 * time.Second
)

// ownSystem reports whether the machine has a system of its own, in which
// guestd is a service.
func (l *life) ownSystem() bool { return l.plan.Image == nil }

// systemOnly reports whether that system is the workload, too: it ends well if
// it is switched off.
func (l *life) systemOnly() bool {
	return l.ownSystem() && len(l.plan.Spec.Entrypoint) == 0 && len(l.plan.Spec.Command) == 0
}

// guestCalled reports whether the machine's guestd has called, in this life or
// in the one that it goes on from.
func (l *life) guestCalled() bool { return l.guest.Load() != nil || l.savedKey != nil }

// pressPower presses the power button of a machine with a system of its own,
// which has its way to stop without guestd, until it is off: in one that still
// boots there is nobody yet who takes notice. The guest kit has none.
func (l *life) pressPower() {
	if !l.ownSystem() || !l.pressing.CompareAndSwap(false, true) {
		return
	}
	again := time.NewTicker(pressAgain)
	defer again.Stop()
	for {
		l.pressOnce()
		select {
		case <-again.C:
		case <-l.machine.Done():
			return
		}
	}
}

func (l *life) pressOnce() {
	ctx, cancel := context.WithTimeout(context.Background(), pressLimit)
	defer cancel()
	err := l.machine.PressPower(ctx)
	select {
	case <-l.machine.Done(): // meanwhile
	default:
		if err != nil {
			fmt.Fprintln(os.Stderr, "press the power button:", err)
		}
	}
}

// offLimit is how long the machine may take to go off once guestd has said that
// it ends. Who asked for that by a deadline gives a system until then.
func (l *life) offLimit(deadline time.Time) time.Duration {
	switch {
	case !l.ownSystem():
		return powerOffLimit
	case deadline.IsZero():
		return systemOffLimit
	}
	return max(time.Until(deadline), powerOffLimit)
}

// cutOff is the end of a machine whose power was cut after guestd had told how
// it ends: of a system that is the workload, that is not how.
func (l *life) cutOff(told shim.End, why string) shim.End {
	if l.ownSystem() && told.Detail == "" {
		told.Detail = why
	}
	if l.systemOnly() && told.ExitCode == 0 {
		told.ExitCode = 128 + int(syscall.SIGKILL)
	}
	return told
}

// booting is what the machine is busy with until its guestd calls.
func (l *life) booting() string {
	if l.ownSystem() {
		return "booting its system, which has to start guestd as a service"
	}
	return "booting the kernel"
}
