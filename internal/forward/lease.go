package forward

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// lease is a Lease that is held. It is the Forwarder's from Reserve or Open
// until Release has ended all that goes through it.
type lease struct {
	Lease
	f      *Forwarder
	ctx    context.Context //nolint:containedctx // it is the lease's life, ended by Release
	cancel context.CancelCauseFunc
	done   chan struct{} // closed once serve has returned
	gone   chan struct{} // closed once the number is free
	// carrying are the goroutines of connections and flows; serve waits for it.
	carrying sync.WaitGroup

	bytesIn, bytesOut, dropped atomic.Uint64

	// Guarded by f.mu:

	state     State
	detail    string
	bindError error
	lastError string
	lastWarn  time.Time
	counters  Counts
	// socket is what it listens on; nil: nothing. fault is what Verify found to
	// be wrong with that, and tried is closed at the next attempt to bind.
	socket socket
	fault  error
	tried  chan struct{}
	// carriers has what is open, with the boot that it leads to; 0: it waits.
	carriers map[carrier]uint64

	flows flows // UDP alone
}

// counts needs f.mu.
func (l *lease) counts() Counts {
	c := l.counters
	c.BytesIn, c.BytesOut, c.Dropped = l.bytesIn.Load(), l.bytesOut.Load(), l.dropped.Load()
	return c
}

// address is where it listens. The BindAddress was parsed before.
func (l Lease) address() (netip.AddrPort, error) {
	if l.BindAddress == "" {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), l.HostPort), nil
	}
	addr, err := netip.ParseAddr(l.BindAddress)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(addr.Unmap(), l.HostPort), nil
}

// Reserve picks a number for each lease whose HostPort is 0, the one that was
// released longest ago first, and checks the numbers of the others. It binds
// nothing for longer than to see that nobody else listens. It reserves all or
// none, and returns them with their numbers. What it returns is either opened
// or released by the caller.
//
// field names the field of lease i in errors, such as "spec.ports[0]". They
// are *sandbox.FieldError, and wrap ErrExists if a number is leased or a
// program listens there, ErrExhausted if all of the range are, ErrDenied if
// the agent may not bind it, and else ErrInvalid.
func (f *Forwarder) Reserve(leases []Lease, field func(i int) string) ([]Lease, error) {
	reserved := make([]Lease, 0, len(leases))
	for i, want := range leases {
		err := f.reserve(&want, field(i))
		if err != nil {
			for _, l := range reserved {
				f.Release(l)
			}
			return nil, err
		}
		reserved = append(reserved, want)
	}
	return reserved, nil
}

func (f *Forwarder) reserve(want *Lease, field string) error {
	at, err := want.address()
	if err != nil {
		return sandbox.Invalidf(field+".bind_address", "%q is not an IP address", want.BindAddress)
	}
	if want.GuestPort == 0 {
		return sandbox.Invalidf(field+".guest_port", "is not from 1 to 65535")
	}
	if want.HostPort != 0 {
		return f.reserveFixed(*want, at, field)
	}
	tried := map[uint16]bool{}
	for {
		port, ok, err := f.pick(*want, tried)
		if err != nil {
			return err
		}
		if !ok {
			return &sandbox.FieldError{
				Field:   field + ".host_port",
				Problem: fmt.Sprintf("all ports from %d to %d are leased or in use", f.cfg.First, f.cfg.Last),
				Err:     sandbox.ErrExhausted,
			}
		}
		tried[port] = true
		picked := *want
		picked.HostPort = port
		err = probe(want.UDP, netip.AddrPortFrom(at.Addr(), port))
		if err == nil {
			*want = picked
			return nil
		}
		f.Release(picked)
		if !errors.Is(err, errInUse) {
			return probeFailed(err, picked, field)
		}
	}
}

func (f *Forwarder) reserveFixed(want Lease, at netip.AddrPort, field string) error {
	f.mu.Lock()
	err := f.free(want, field)
	if err == nil {
		f.claim(want)
	}
	f.mu.Unlock()
	if err != nil {
		return err
	}
	if err := probe(want.UDP, at); err != nil {
		f.Release(want)
		return probeFailed(err, want, field)
	}
	return nil
}

// probeFailed says what the caller can do about it.
func probeFailed(err error, l Lease, field string) error {
	switch {
	case errors.Is(err, errInUse):
		return &sandbox.FieldError{
			Field: field + ".host_port", Err: sandbox.ErrExists,
			Problem: fmt.Sprintf("%d is in use by another program", l.HostPort),
		}
	case errors.Is(err, errNoAddress):
		return sandbox.Invalidf(field+".bind_address", "%s is no address of this host", l.BindAddress)
	case errors.Is(err, errNotAllowed):
		return &sandbox.FieldError{
			Field: field + ".host_port", Err: sandbox.ErrDenied,
			Problem: fmt.Sprintf("%d may not be bound by the agent's user", l.HostPort),
		}
	}
	return fmt.Errorf("look at port %d: %w", l.HostPort, err)
}

// free returns an error if the number is leased. f.mu is held.
func (f *Forwarder) free(want Lease, field string) error {
	if f.closed {
		return fmt.Errorf("forward %s port %d: %w: the agent is ending", want.Protocol(), want.HostPort, sandbox.ErrState)
	}
	l := f.leases[key{want.UDP, want.HostPort}]
	if l == nil {
		return nil
	}
	problem := fmt.Sprintf("%d is leased to sandbox %s", want.HostPort, l.Sandbox)
	if l.Sandbox == want.Sandbox {
		problem = fmt.Sprintf("%d is leased to another port of this sandbox", want.HostPort)
	}
	return &sandbox.FieldError{Field: field + ".host_port", Problem: problem, Err: sandbox.ErrExists}
}

// pick claims the number of the range that was released longest ago and is
// not of another sandbox, whatever the protocol; ok is false if there is none
// but those that were tried.
func (f *Forwarder) pick(want Lease, tried map[uint16]bool) (port uint16, ok bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var oldest uint64
	for number := int(f.cfg.First); number <= int(f.cfg.Last); number++ {
		candidate := uint16(number)
		mine, twin := key{want.UDP, candidate}, key{!want.UDP, candidate}
		if tried[candidate] || f.leases[mine] != nil {
			continue
		}
		if other := f.leases[twin]; other != nil && other.Sandbox != want.Sandbox {
			continue
		}
		if at := max(f.released[mine], f.released[twin]); !ok || at < oldest {
			port, oldest, ok = candidate, at, true
		}
	}
	if !ok {
		return 0, false, nil
	}
	want.HostPort = port
	if err := f.free(want, ""); err != nil {
		return 0, false, err
	}
	f.claim(want)
	return port, true, nil
}

// claim holds a number that is free. f.mu is held.
func (f *Forwarder) claim(want Lease) *lease {
	l := &lease{
		Lease: want, f: f, state: StateReserved, carriers: map[carrier]uint64{},
		done: make(chan struct{}), gone: make(chan struct{}), tried: make(chan struct{}),
	}
	l.ctx, l.cancel = context.WithCancelCause(f.ctx)
	f.leases[key{want.UDP, want.HostPort}] = l
	if f.sandboxes[want.Sandbox] == nil {
		f.sandboxes[want.Sandbox] = &tally{}
	}
	f.sandboxes[want.Sandbox].leases++
	return l
}

// drop gives the number back. used says that somebody may have seen it.
func (f *Forwarder) drop(l *lease, used bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	k := key{l.UDP, l.HostPort}
	delete(f.leases, k)
	if used {
		f.releases++
		f.released[k] = f.releases
		past := &f.past[protocolIndex(l.UDP)]
		past.add(l.counts())
	}
	t := f.sandboxes[l.Sandbox]
	if t.leases--; t.leases == 0 {
		delete(f.sandboxes, l.Sandbox)
	}
	l.cancel(errReleased)
	close(l.gone)
}

// Open listens on a lease that the caller has recorded, and serves it until it
// is released. It need not have been reserved by this Forwarder. If the port
// cannot be bound the error says why; the lease is held all the same, and
// binding is tried again until it works or the lease is released. If it is
// open already Open changes nothing. If another sandbox holds the number the
// error wraps ErrExists, and nothing is held.
func (f *Forwarder) Open(want Lease) error {
	at, err := want.address()
	if err != nil || want.HostPort == 0 || want.GuestPort == 0 {
		return sandbox.Invalidf("lease", "%s port %d at %q to %d is incomplete", want.Protocol(), want.HostPort, want.BindAddress, want.GuestPort)
	}
	f.mu.Lock()
	l := f.leases[key{want.UDP, want.HostPort}]
	if l == nil || l.Sandbox != want.Sandbox {
		if err := f.free(want, "lease"); err != nil {
			f.mu.Unlock()
			return err
		}
		l = f.claim(want)
	}
	switch l.state {
	case StateListening, StateBlocked:
		err := l.bindError
		f.mu.Unlock()
		return err
	case StateReleasing:
		f.mu.Unlock()
		return fmt.Errorf("open %s port %d: %w: it is being released", want.Protocol(), want.HostPort, sandbox.ErrState)
	case StateReserved:
	}
	l.Lease = want
	l.state = StateBlocked
	kept := f.takeInherited(want.UDP, at)
	first := make(chan error, 1)
	f.wg.Go(func() { l.serve(at, kept, first) })
	f.mu.Unlock()
	return <-first
}

// Release ends a lease: it stops listening, resets what is open through it,
// and returns once all of that is over. Only then may the number be leased
// again. If the sandbox does not hold it, it does nothing.
func (f *Forwarder) Release(want Lease) {
	f.mu.Lock()
	l := f.leases[key{want.UDP, want.HostPort}]
	if l == nil || l.Sandbox != want.Sandbox {
		f.mu.Unlock()
		return
	}
	was := l.state
	l.state = StateReleasing
	f.mu.Unlock()
	if was == StateReleasing {
		<-l.gone
		return
	}
	l.cancel(errReleased)
	if was != StateReserved {
		<-l.done
		l.forget()
	}
	f.drop(l, was != StateReserved)
}

// ReleaseAll releases all leases of a sandbox.
func (f *Forwarder) ReleaseAll(sandbox string) {
	var all sync.WaitGroup
	for _, s := range f.Leases(sandbox) {
		if s.Sandbox == sandbox {
			all.Go(func() { f.Release(s.Lease) })
		}
	}
	all.Wait()
}
