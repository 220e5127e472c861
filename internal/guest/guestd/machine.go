//go:build linux

package guestd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/machine"
)

// life is guestd in a virtual machine.
type life struct {
	*server
	host      *host
	initramfs *machine.Initramfs // nil: guestd is a service
	made      *machine.Made      // once ready
	kills     uint64             // machine.OOMKills when the machine was made
}

// runMachine is run in a virtual machine. Where guestd is its first process,
// the machine is off before this returns.
func runMachine(ctx context.Context, o options, first bool, signals <-chan os.Signal) (int, error) {
	code, err := live(ctx, o, first, signals)
	if !first {
		return code, errors.Join(err, machine.AskToPowerOff())
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "guestd: %v\n", err)
	}
	return code, machine.PowerOff()
}

func live(ctx context.Context, o options, first bool, signals <-chan os.Signal) (int, error) {
	l := &life{server: newServer(o, first)}
	if first {
		var err error
		if l.initramfs, err = machine.Begin(); err != nil {
			return exitFault, err
		}
		if err := l.initramfs.LoadModules(machine.StageChannel); err != nil {
			return exitFault, err
		}
		raiseLimits()
	}
	if err := l.open(ctx, o); err != nil {
		return exitFault, err
	}
	h, plan, err := callHost(ctx, l.rekey)
	if err != nil {
		return exitFault, err
	}
	l.host = h
	l.workload.streams.take = h.take
	go h.follow(ctx)
	go l.become(ctx, plan)
	e := l.supervise(signals)
	l.finish(e)
	return e.code, e.err
}

// raiseLimits lets there be as many open files as in a container.
func raiseLimits() {
	const files = 1 << 20
	// That of package syscall, for children get the one from before another.
	_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: files, Max: files})
}

// become makes the machine, in which then there is something to do.
func (l *life) become(ctx context.Context, plan *guestv1.Machine) {
	defer close(l.ready)
	l.fault = l.build(plan)
	if l.fault != nil {
		l.workload.end(ending{exitFault, l.fault})
		return
	}
	l.host.stage("")
	l.kills = machine.OOMKills()
	go l.made.KeepLease(ctx)
	if l.initramfs != nil {
		go func() { // that, too, can wait
			<-l.workload.started
			_ = l.initramfs.LoadModules(machine.StageLater) // what needs one says so
			l.initramfs.Free()
		}()
	}
}

func (l *life) build(plan *guestv1.Machine) error {
	user := plan.GetWorkload().GetUser()
	owner := func() (uint32, uint32) {
		who, err := find(user)
		if err != nil {
			return 0, 0 // and settle says why
		}
		return who.uid, who.gid
	}
	made, err := machine.Make(plan, l.initramfs, owner, l.host.stage)
	if err != nil {
		return fmt.Errorf("make the machine: %w", err)
	}
	l.made = made
	if err := l.workload.settle(plan.GetWorkload(), l.initramfs != nil); err != nil {
		return fmt.Errorf("make the workload's place: %w", err)
	}
	if l.initramfs != nil {
		l.workload.name = made.Name
	}
	return nil
}

// supervise returns how it ended, and obeys signals until then.
func (l *life) supervise(signals <-chan os.Signal) ending {
	for {
		var number syscall.Signal
		select {
		case e := <-l.workload.ended:
			if e.err == nil {
				l.workload.awaitAnswer()
			}
			return e
		case <-l.host.gone:
			return ending{exitFault, errors.New("the host is gone")}
		case number = <-l.host.orders:
		case sig := <-signals:
			number, _ = sig.(syscall.Signal)
		}
		if l.workload.signal(number) || !ends(number) {
			continue
		}
		return ending{code: l.workload.endedBy(number)}
	}
}

// finish ends all that is left, tells the host, and leaves the disks in order.
func (l *life) finish(e ending) {
	l.children.killAll()
	l.workload.streams.drained(l.host.gone)
	machine.Settle()
	ended := &guestv1.Ended{Code: int32(e.code)} //nolint:gosec // At most 255.
	if e.err != nil {
		ended.Message = failure(e.err).GetMessage()
	}
	select {
	case <-l.ready:
		ended.OomKilled = e.code == exitSignalBase+int(syscall.SIGKILL) && machine.OOMKills() > l.kills
	default: // it never was
	}
	l.host.farewell(ended)
	if l.initramfs == nil {
		return // the system has more to write
	}
	select {
	case <-l.ready:
		l.made.Freeze()
	default:
	}
}
