package manager

import (
	"context"
	"fmt"
	"net"

	"github.com/choiros/agent/internal/sandbox"
)

// Console opens the console of a sandbox that runs, or is becoming ready; see
// sandbox.Console. It counts as activity until it is closed.
func (m *Manager) Console(ctx context.Context, name string) (conn net.Conn, generation uint64, err error) {
	s, err := m.Sandbox(ctx, name)
	if err != nil {
		return nil, 0, err
	}
	e, err := m.find(name)
	if err != nil {
		return nil, 0, err
	}
	drv, err := m.driver(s.Spec.Driver)
	if err != nil {
		return nil, 0, err
	}
	console, ok := drv.(sandbox.Console)
	if !ok {
		return nil, 0, fmt.Errorf("console of %s: driver %s has none: %w", name, s.Spec.Driver, sandbox.ErrUnsupported)
	}
	switch s.Phase {
	case PhaseStarting, PhaseReady, PhasePaused, PhaseStopping:
	default:
		return nil, 0, fmt.Errorf("console of %s: it is %s: %w", name, s.Phase, sandbox.ErrState)
	}
	bounded, cancel := context.WithTimeout(ctx, inspectDeadline)
	defer cancel()
	inner, err := console.Console(bounded, m.ref(name))
	if err != nil {
		return nil, 0, deadlined(bounded, err)
	}
	return &heldConn{inner, e.hold()}, s.Generation, nil
}

// heldConn is a connection that keeps its sandbox from being idle.
type heldConn struct {
	net.Conn
	release func()
}

func (c *heldConn) Close() error {
	c.release()
	return c.Conn.Close()
}
