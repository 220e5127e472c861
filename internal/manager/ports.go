package manager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/choiros/agent/internal/forward"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

// While a sandbox without a readiness probe is this young, a port that refuses
// connections is taken for one that does not listen yet.
const (
	youth      = 10 * time.Second
	retryPort  = 25 * time.Millisecond
	retryGuest = 3
	// portTries is how often a leased number may be found taken in a row.
	portTries = 5
)

// Endpoint is a port inside that is reachable on the host.
type Endpoint struct {
	Name      string // the port's name, or its number
	Address   netip.AddrPort
	GuestPort uint16
	UDP       bool
	// Auto says that nobody asked for it: something was found to listen there.
	Auto bool
}

func endpointOf(l store.Lease) Endpoint {
	address := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if given, err := netip.ParseAddr(l.BindAddress); err == nil {
		address = given.Unmap()
	}
	return Endpoint{
		Name:    cmp.Or(l.Name, fmt.Sprint(l.GuestPort)),
		Address: netip.AddrPortFrom(address, l.HostPort), GuestPort: l.GuestPort, UDP: l.UDP, Auto: l.Auto,
	}
}

func forwardLease(name string, l store.Lease) forward.Lease {
	return forward.Lease{
		Sandbox: name, Name: l.Name, GuestPort: l.GuestPort, HostPort: l.HostPort,
		UDP: l.UDP, BindAddress: l.BindAddress, Auto: l.Auto,
	}
}

// reserve leases host ports for what a spec declares. Nothing listens yet.
func (m *Manager) reservePorts(name string, ports []sandbox.Port, field func(i int) string) ([]store.Lease, error) {
	wanted := make([]forward.Lease, len(ports))
	for i, p := range ports {
		wanted[i] = forward.Lease{
			Sandbox: name, Name: p.Name, GuestPort: p.GuestPort, HostPort: p.HostPort, UDP: p.UDP, BindAddress: p.BindAddress,
		}
	}
	reserved, err := m.forward.Reserve(wanted, field)
	if err != nil {
		return nil, err
	}
	leases := make([]store.Lease, len(reserved))
	for i, l := range reserved {
		leases[i] = store.Lease{
			Name: l.Name, GuestPort: l.GuestPort, HostPort: l.HostPort, UDP: l.UDP, BindAddress: l.BindAddress,
		}
	}
	return leases, nil
}

func specPort(i int) string { return fmt.Sprintf("spec.ports[%d]", i) }

// openPorts listens on the leases of a record. What cannot be bound is tried
// again by itself, and shown meanwhile.
func (m *Manager) openPorts(name string, leases []store.Lease) {
	for _, l := range leases {
		if err := m.forward.Open(forwardLease(name, l)); err != nil {
			m.log.Warn("port not bound", "sandbox", name, "port", l.HostPort, "err", err)
		}
	}
}

// holdPorts keeps the ports of a sandbox that is being deleted from others,
// and listens on none.
func (m *Manager) holdPorts(name string, leases []store.Lease) {
	for _, l := range leases {
		if _, err := m.forward.Reserve([]forward.Lease{forwardLease(name, l)}, specPort); err != nil {
			m.log.Warn("port not held", "sandbox", name, "port", l.HostPort, "err", err)
		}
	}
}

// settlePorts listens on leases that were just recorded. A leased number that
// another program took in between is given up for another: nobody knows of it
// yet. It needs the operation lock.
func (m *Manager) settlePorts(e *entry, fresh []store.Lease) {
	for range portTries {
		var lost []store.Lease
		for _, l := range fresh {
			err := m.forward.Open(forwardLease(e.name, l))
			fixed := slices.ContainsFunc(e.rec.Spec.Ports, func(p sandbox.Port) bool {
				return p.GuestPort == l.GuestPort && p.UDP == l.UDP && p.HostPort != 0
			})
			if err != nil && fixed {
				m.log.Warn("port not bound", "sandbox", e.name, "port", l.HostPort, "err", err)
			}
			if err != nil && !fixed {
				lost = append(lost, l)
			}
		}
		if len(lost) == 0 {
			return
		}
		if fresh = m.replaceLeases(e, lost); len(fresh) == 0 {
			return
		}
	}
}

// replaceLeases leases other numbers in the place of some, and returns them.
func (m *Manager) replaceLeases(e *entry, lost []store.Lease) []store.Lease {
	ports := make([]sandbox.Port, len(lost))
	for i, l := range lost {
		ports[i] = sandbox.Port{Name: l.Name, GuestPort: l.GuestPort, UDP: l.UDP, BindAddress: l.BindAddress}
	}
	fresh, err := m.reservePorts(e.name, ports, specPort)
	if err != nil {
		m.log.Warn("port not bound", "sandbox", e.name, "err", err)
		return nil
	}
	for i := range fresh {
		fresh[i].Auto = lost[i].Auto
	}
	err = m.put(e, func(r *store.Record) {
		r.Leases = slices.DeleteFunc(slices.Clone(r.Leases), func(l store.Lease) bool { return slices.Contains(lost, l) })
		r.Leases = append(r.Leases, fresh...)
	}, nil)
	unwanted := lost
	if err != nil {
		m.log.Error("record not written", "sandbox", e.name, "err", err)
		unwanted, fresh = fresh, nil
	}
	for _, l := range unwanted {
		m.forward.Release(forwardLease(e.name, l))
	}
	return fresh
}

// PortStatus is one forward as it is now.
type PortStatus struct {
	Endpoint   Endpoint
	Generation uint64
	// Problem is why the agent does not listen; empty: it does.
	Problem string
	Counts  forward.Counts
}

// Ports returns a sandbox's forwards.
func (m *Manager) Ports(ctx context.Context, name string) ([]PortStatus, error) {
	s, err := m.Sandbox(ctx, name)
	if err != nil {
		return nil, err
	}
	var ports []PortStatus
	for _, status := range m.forward.Leases(name) {
		l := status.Lease
		ports = append(ports, PortStatus{
			Endpoint: endpointOf(store.Lease{
				Name: l.Name, GuestPort: l.GuestPort, HostPort: l.HostPort, UDP: l.UDP, BindAddress: l.BindAddress, Auto: l.Auto,
			}),
			Generation: s.Generation, Problem: status.Detail, Counts: status.Counts,
		})
	}
	return ports, nil
}

// AddPort forwards one more port of a sandbox, running or not. One that is
// forwarded already is left as it is.
func (m *Manager) AddPort(ctx context.Context, name string, port sandbox.Port) (PortStatus, error) {
	e, err := m.find(name)
	if err != nil {
		return PortStatus{}, err
	}
	probe := e.view().Spec.Clone()
	probe.Ports = []sandbox.Port{port}
	if err := probe.Validate(); err != nil {
		return PortStatus{}, inField(err, specPort(0), "port")
	}
	err = m.detach(ctx, func(ctx context.Context) error {
		if err := e.lock(ctx); err != nil {
			return err
		}
		defer e.unlock()
		return m.addPort(e, port, false)
	})
	if err != nil {
		return PortStatus{}, err
	}
	ports, err := m.Ports(ctx, name)
	for _, p := range ports {
		if p.Endpoint.GuestPort == port.GuestPort && p.Endpoint.UDP == port.UDP {
			return p, nil
		}
	}
	return PortStatus{}, cmp.Or(err, fmt.Errorf("port %d of %s: %w", port.GuestPort, name, sandbox.ErrSuperseded))
}

// inField renames the field of a field error.
func inField(err error, from, to string) error {
	var wrong *sandbox.FieldError
	if !errors.As(err, &wrong) || len(wrong.Field) < len(from) || wrong.Field[:len(from)] != from {
		return err
	}
	renamed := *wrong
	renamed.Field = to + wrong.Field[len(from):]
	return &renamed
}

// addPort records a lease and opens it. It needs the operation lock.
func (m *Manager) addPort(e *entry, port sandbox.Port, auto bool) error {
	if e.rec.Desired == store.DesiredDeleted {
		return fmt.Errorf("forward port %d of %s: it is being deleted: %w", port.GuestPort, e.name, sandbox.ErrState)
	}
	for _, l := range e.rec.Leases {
		if l.GuestPort != port.GuestPort || l.UDP != port.UDP {
			continue
		}
		if port.HostPort != 0 && port.HostPort != l.HostPort {
			return &sandbox.FieldError{
				Field: "port.guest_port", Err: sandbox.ErrExists,
				Problem: fmt.Sprintf("%d is forwarded already, from %s; remove that first", port.GuestPort, endpointOf(l).Address),
			}
		}
		return nil
	}
	leases, err := m.reservePorts(e.name, []sandbox.Port{port}, func(int) string { return "port" })
	if err != nil {
		return err
	}
	leases[0].Auto = auto
	m.step("port:intent")
	err = m.put(e, func(r *store.Record) {
		r.Leases = append(slices.Clone(r.Leases), leases...)
		if !auto {
			r.Spec = r.Spec.Clone()
			r.Spec.Ports = append(r.Spec.Ports, port)
			r.UpdatedAt = time.Now()
		}
	}, nil)
	if err != nil {
		m.forward.Release(forwardLease(e.name, leases[0]))
		return fmt.Errorf("forward port %d of %s: %w", port.GuestPort, e.name, err)
	}
	m.log.Info("port forwarded", "sandbox", e.name, "guest_port", port.GuestPort, "host_port", leases[0].HostPort, "auto", auto)
	m.settlePorts(e, leases)
	return nil
}

// RemovePort ends a forward, and what is open through it.
func (m *Manager) RemovePort(ctx context.Context, name string, guestPort uint16, udp, allowMissing bool, req Request) error {
	e, err := m.find(name)
	if err != nil {
		return err
	}
	return m.detach(ctx, func(ctx context.Context) error {
		if err := e.lock(ctx); err != nil {
			return err
		}
		defer e.unlock()
		i := slices.IndexFunc(e.rec.Leases, func(l store.Lease) bool { return l.GuestPort == guestPort && l.UDP == udp })
		switch {
		case i < 0 && (allowMissing || req.ID != "" && e.rec.Unforwarded == req):
			return nil
		case i < 0:
			return fmt.Errorf("forward of port %d of %s: %w", guestPort, name, sandbox.ErrNotFound)
		}
		gone := e.rec.Leases[i]
		m.step("port:remove")
		err := m.put(e, func(r *store.Record) {
			r.Unforwarded = req
			r.Leases = slices.Delete(slices.Clone(r.Leases), i, i+1)
			r.Spec = r.Spec.Clone()
			r.Spec.Ports = slices.DeleteFunc(r.Spec.Ports, func(p sandbox.Port) bool {
				return p.GuestPort == guestPort && p.UDP == udp
			})
			r.UpdatedAt = time.Now()
		}, nil)
		if err != nil {
			return fmt.Errorf("remove the forward of port %d of %s: %w", guestPort, name, err)
		}
		m.step("port:removed")
		m.forward.Release(forwardLease(name, gone))
		m.log.Info("port not forwarded any more", "sandbox", name, "guest_port", guestPort, "host_port", gone.HostPort)
		return nil
	})
}

// Connect implements forward.Backend: it opens a connection to a port inside,
// starting the sandbox if it does not run.
func (m *Manager) Connect(ctx context.Context, name string, port uint16, udp bool) (net.Conn, uint64, error) {
	for tries := 1; ; tries++ {
		s, err := m.Start(ctx, name)
		if err != nil {
			return nil, 0, err
		}
		e, err := m.find(name)
		if err != nil {
			return nil, 0, err
		}
		if !udp {
			if conn := e.connectSpare(ctx, s.Generation, port); conn != nil {
				return conn, s.Generation, nil
			}
		}
		drv, err := m.driver(s.Spec.Driver)
		if err != nil {
			return nil, 0, err
		}
		conn, err := m.guest(drv, name).Connect(ctx, port, udp)
		switch {
		case err == nil:
			return conn, s.Generation, nil
		case errors.Is(err, sandbox.ErrRefused) && !s.Spec.Readiness.Probes() && time.Since(s.ReadyAt) < youth:
			// Woken a moment ago.
		case errors.Is(err, sandbox.ErrUnavailable) && tries < retryGuest:
			// It has just ended, perhaps; then the next Start boots it.
		default:
			return nil, 0, err
		}
		select {
		case <-time.After(retryPort):
		case <-ctx.Done():
			return nil, 0, err
		}
	}
}

// Active implements forward.Backend.
func (m *Manager) Active(name string) {
	if e, err := m.find(name); err == nil {
		e.touch(time.Now())
	}
}

// Tunnel opens a connection to a port inside that counts as activity until
// release is called. wake: a sandbox that does not run is started.
func (m *Manager) Tunnel(ctx context.Context, name string, port uint16, udp, wake bool) (conn net.Conn, generation uint64, release func(), err error) {
	if wake {
		e, err := m.find(name)
		if err != nil {
			return nil, 0, nil, err
		}
		release = e.hold()
		if conn, generation, err = m.Connect(ctx, name, port, udp); err != nil {
			release()
			return nil, 0, nil, err
		}
		return conn, generation, release, nil
	}
	visit, err := m.Visit(ctx, name)
	if err != nil {
		return nil, 0, nil, err
	}
	if conn, err = visit.Guest.Connect(ctx, port, udp); err != nil {
		visit.Leave()
		return nil, 0, nil, err
	}
	return conn, visit.Generation, visit.Leave, nil
}
