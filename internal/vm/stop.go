package vm

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/shim"
)

// kill cuts the power. The machine ends, or its Done would lie.
func (l *life) kill() {
	if err := l.machine.Kill(); err != nil {
		fmt.Fprintln(os.Stderr, "kill the machine:", err)
	}
}

// ask has the workload end by itself. Nobody waits for it: whatever holds the
// machine up meanwhile, its grace runs out.
func (l *life) ask() { l.tasks.Go(l.signal) }

// signal has guestd ask the workload to end, for which the machine has to run.
func (l *life) signal() {
	switch err := l.setPaused(false); {
	case errors.Is(err, errSaved):
		return // it ends, and its workload goes on another time, or never
	case err != nil:
		fmt.Fprintln(os.Stderr, "resume the machine:", err)
	}
	number := sigTerm
	if l.plan.Image != nil {
		number = l.plan.Image.StopSignal
	}
	if l.guest.Load() == nil {
		return // it is told once it has called
	}
	if err := l.send(&guestv1.MachineOrder{Signal: number}); err != nil {
		// A guest that takes no orders has its grace, and then is killed.
		fmt.Fprintln(os.Stderr, "signal the guest:", err)
		l.pressPower()
	}
}

// send gives guestd an order.
func (l *life) send(order *guestv1.MachineOrder) error {
	conn := l.guest.Load()
	if conn == nil {
		return errors.New("it has not called")
	}
	l.sending.Lock()
	defer l.sending.Unlock()
	_ = conn.NetConn().SetWriteDeadline(time.Now().Add(time.Second))
	return conn.Send(order)
}

// waited is the end of a life whose end is known, once the machine is off.
// deadline is that of who asked for the end; zero: nobody has.
func (l *life) waited(end shim.End, deadline time.Time) shim.End {
	limit := l.offLimit(deadline)
	over, until := time.NewTimer(limit), time.Now().Add(limit)
	defer over.Stop()
	for {
		select {
		case <-l.machine.Done():
			return end
		case <-l.rebooted: // in the stead of going off
			l.kill()
			<-l.machine.Done()
			return end
		case grace := <-l.Stops:
			if grace <= 0 {
				l.kill()
				<-l.machine.Done()
				return l.cutOff(end, "")
			}
			if sooner := time.Now().Add(max(grace, powerOffLimit)); sooner.Before(until) {
				until = sooner
				over.Reset(time.Until(until))
			}
		case <-over.C:
			l.kill()
			<-l.machine.Done()
			return l.cutOff(end, "its system did not switch itself off, and was killed")
		}
	}
}

// idleTimer is a timer that is yet to be set.
func idleTimer() *time.Timer {
	timer := time.NewTimer(0)
	<-timer.C
	return timer
}

// fell is the end of a machine that went before its guestd was heard to say so,
// or without a word.
func (l *life) fell(detail string, killed bool) shim.End {
	select {
	case <-l.heard:
	case <-time.After(lastWordLimit):
	}
	select {
	case ended := <-l.ended:
		return endOf(ended)
	default:
	}
	err := l.machine.Err()
	if err != nil {
		detail = err.Error()
	} else if !killed && l.systemOnly() && l.guestCalled() {
		return shim.End{}
	}
	if !killed {
		detail = l.unbidden(detail)
	}
	return shim.End{ExitCode: 128 + int(syscall.SIGKILL), Detail: printable(detail)}
}

// unbidden is why a machine ended that nobody had killed, as far as its
// hypervisor knows, and what its console said last.
func (l *life) unbidden(detail string) string {
	if detail == "" {
		detail = "the guest switched itself off"
	}
	if l.guest.Load() == nil {
		detail += " before its guestd had called"
	}
	if words := l.console.lastWords(); words != "" {
		detail += "; its console said last: " + words
	}
	switch {
	case l.guestCalled():
	case l.ownSystem():
		detail += " (its system has to run guestd as a service, and its kernel to have virtio vsock; see docs/guest-kit.md)"
	default:
		detail += " (if that goes on, build the guest kit anew with make guest-kit)"
	}
	return detail
}

// endOf is the end that guestd tells of.
func endOf(ended *guestv1.Ended) shim.End {
	return shim.End{
		FinishedAt: time.Now(), ExitCode: int(ended.GetCode()) & 0xff,
		OOMKilled: ended.GetOomKilled(), Detail: printable(ended.GetMessage()),
	}
}
