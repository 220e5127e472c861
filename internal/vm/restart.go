package vm

import (
	"context"
	"fmt"
	"net"
	"syscall"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/shim"
)

// lastReservedPort is the last of vsock's ports that a guest's kernel gives to
// processes with CAP_NET_BIND_SERVICE alone; see machine.proto.
const lastReservedPort = 1023

// lookInterval is how often a machine that its guest can restart is looked at,
// and how long that may take.
const lookInterval = 15 * time.Second

// leastAbsence is how long guestd may be away at least: one on a Mac that has
// woken was seen to take a minute.
const leastAbsence = 2 * time.Minute

// restarted reports whether a caller that has no key shows that the guest has
// booted anew in this life: that it is a guestd, and of another boot than the
// one that called first.
func (l *life) restarted(conn net.Conn, awake *guestv1.Awake) bool {
	machine, ok := l.machine.(Rebooter)
	if !ok || len(awake.GetKey()) > 0 || machine.SourcePort(conn) > lastReservedPort {
		return false
	}
	booted := l.booted.Load()
	return booted == nil || *booted == "" || *booted != awake.GetBoot()
}

// look sees to it that a machine which its guest can restart does not go on
// without a guestd: one that has booted anew and comes no further calls nobody.
// It returns when the machine has ended, or is to.
func (l *life) look() {
	limit := max(l.plan.Spec.Readiness.ReadyTimeout(), leastAbsence)
	tick := time.NewTicker(lookInterval)
	defer tick.Stop()
	var since time.Time // it is not there; zero: it is
	for {
		select {
		case <-tick.C:
		case <-l.machine.Done():
			return
		}
		switch {
		case l.guest.Load() == nil || l.halted() || l.there():
			since = time.Time{}
		case since.IsZero():
			since = time.Now()
		case time.Since(since) >= limit:
			l.lost <- fmt.Sprintf("its guestd was not there for %v: the guest has restarted without it, or is stuck", limit)
			return
		}
	}
}

// halted reports whether the machine is paused, or somebody is about to change
// that.
func (l *life) halted() bool {
	if !l.changing.TryLock() {
		return true
	}
	defer l.changing.Unlock()
	return l.paused || l.asleep
}

// there reports whether somebody listens where guestd does.
func (l *life) there() bool {
	ctx, cancel := context.WithTimeout(context.Background(), lookInterval)
	defer cancel()
	conn, err := l.machine.Dial(ctx, wire.Port)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// cut is the end of a life that nobody had wanted to end yet, and why.
func (l *life) cut(why string) shim.End {
	l.kill()
	<-l.machine.Done()
	return shim.End{ExitCode: 128 + int(syscall.SIGKILL), Detail: printable(l.unbidden(why))}
}
