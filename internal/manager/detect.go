package manager

import (
	"cmp"
	"slices"

	"github.com/choiros/agent/internal/forward"
	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

// autoPolicy is a spec's policy in the forwarder's terms.
func autoPolicy(auto sandbox.AutoForward) forward.Policy {
	policy := forward.Policy{Mode: forward.ModeOffer}
	switch auto.Mode {
	case sandbox.AutoForwardOff:
		policy.Mode = forward.ModeOff
	case sandbox.AutoForwardForward:
		policy.Mode = forward.ModeForward
	case sandbox.AutoForwardOffer:
	}
	for _, port := range auto.Deny {
		policy.Deny = append(policy.Deny, forward.PortRange{First: port, Last: port, Why: "denied by the spec"})
	}
	return policy
}

// seeListeners acts on what listens inside: by the spec's policy it is shown,
// or forwarded too. It needs the operation lock.
func (m *Manager) seeListeners(e *entry, listeners []guest.Listener) {
	found := make([]forward.Found, 0, len(listeners))
	type port struct {
		number uint16
		udp    bool
	}
	programs := map[port]string{}
	for _, l := range listeners {
		found = append(found, forward.Found{Port: l.Port, UDP: l.UDP, Address: l.Address})
		programs[port{l.Port, l.UDP}] = cmp.Or(l.Program, programs[port{l.Port, l.UDP}])
	}
	leases := make([]forward.Lease, 0, len(e.rec.Leases))
	for _, l := range e.rec.Leases {
		leases = append(leases, forwardLease(e.name, l))
	}
	listens := func(l store.Lease) bool {
		return slices.ContainsFunc(found, func(f forward.Found) bool { return f.Port == l.GuestPort && f.UDP == l.UDP })
	}
	decisions, _ := autoPolicy(e.rec.Spec.AutoForward).Decide(found, leases)
	var detected []Detected
	for _, d := range decisions {
		seen := Detected{Port: d.Port, UDP: d.UDP, Program: programs[port{d.Port, d.UDP}], Refusal: d.Why}
		switch d.Verdict {
		case forward.VerdictDeclared:
			continue
		case forward.VerdictForward:
			err := m.makeRoom(e, listens)
			if err == nil {
				err = m.addPort(e, sandbox.Port{GuestPort: d.Port, UDP: d.UDP}, true)
			}
			if err == nil {
				continue
			}
			m.log.Warn("port not forwarded", "sandbox", e.name, "guest_port", d.Port, "err", err)
			seen.Refusal = err.Error()
		case forward.VerdictOffer, forward.VerdictRefuse:
		}
		detected = append(detected, seen)
	}
	if !slices.Equal(detected, e.snap.Load().Detected) {
		m.see(e, func(s *Sandbox) { s.Detected = detected })
	}
}

// makeRoom releases what was forwarded by itself and is not listened on any
// more, once there is as much as a sandbox may have: a guest that goes from
// port to port is not to use up the host's.
func (m *Manager) makeRoom(e *entry, listens func(store.Lease) bool) error {
	auto, stale := 0, -1
	for i, l := range e.rec.Leases {
		if l.Auto {
			auto++
		}
		if l.Auto && stale < 0 && !listens(l) {
			stale = i
		}
	}
	if auto < forward.MaxAuto || stale < 0 {
		return nil
	}
	gone := e.rec.Leases[stale]
	if err := m.put(e, func(r *store.Record) {
		r.Leases = slices.Delete(slices.Clone(r.Leases), stale, stale+1)
	}, nil); err != nil {
		return err
	}
	m.forward.Release(forwardLease(e.name, gone))
	return nil
}
