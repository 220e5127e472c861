//go:build linux

package guestd

import (
	"context"
	"fmt"
	"net"
	"syscall"
	"time"

	"github.com/mdlayher/vsock"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/machine"
	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/version"
)

const (
	// hostPort is where the shim of a machine listens; see machine.proto.
	hostPort = 1025
	// callLimit is how long the shim may take to accept guestd's call, and to
	// answer it.
	callLimit = time.Minute
)

// host is guestd's connection to the shim that owns the machine.
type host struct {
	conn *wire.Conn
	// orders are signals, as if guestd had been sent them.
	orders chan syscall.Signal
	// gone is closed once the connection has ended.
	gone chan struct{}
}

// callHost calls the shim, and returns what the machine is to become.
func callHost(ctx context.Context, credit bool) (*host, *guestv1.Machine, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	port, err := machine.HostPort(hostPort)
	if err != nil {
		return nil, nil, fmt.Errorf("find out where to call the host: %w", err)
	}
	raw, err := dialHost(ctx, port)
	if err != nil {
		return nil, nil, fmt.Errorf("call the host: %w", err)
	}
	if credit {
		raw = wire.WithCredit(raw)
	}
	h := &host{conn: wire.New(raw, wire.MaxFrame), orders: make(chan syscall.Signal), gone: make(chan struct{})}
	_ = raw.SetDeadline(time.Now().Add(callLimit))
	var m guestv1.Machine
	if err = h.conn.Send(&guestv1.Awake{Protocol: wire.Protocol, Version: version.String()}); err == nil {
		err = h.conn.ReceiveMessage(&m)
	}
	if err != nil {
		raw.Close()
		return nil, nil, fmt.Errorf("ask the host what the machine is to become: %w", err)
	}
	_ = raw.SetDeadline(time.Time{})
	return h, &m, nil
}

// dialHost connects to the shim, which may be slower to listen than guestd is
// to start.
func dialHost(ctx context.Context, port uint32) (net.Conn, error) {
	for {
		conn, err := vsock.Dial(hostCID, port, nil)
		if err == nil {
			return conn, nil
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// follow takes orders until the connection ends, or ctx does.
func (h *host) follow(ctx context.Context) {
	defer close(h.gone)
	for {
		var order guestv1.MachineOrder
		if err := h.conn.ReceiveMessage(&order); err != nil {
			return
		}
		number := order.GetSignal()
		if number < 1 || number > maxSignal {
			continue
		}
		select {
		case h.orders <- syscall.Signal(number):
		case <-ctx.Done():
			return
		}
	}
}

// stage tells people what is being done. That nobody hears it shows elsewhere.
func (h *host) stage(what string) {
	_ = h.conn.Send(&guestv1.MachineNote{Note: &guestv1.MachineNote_Stage{Stage: what}})
}

// take sends what the workload prints.
func (h *host) take(kind wire.Kind, data []byte) { _ = h.conn.SendData(kind, data) }

// farewell says how it ended, and returns once the shim has heard it.
func (h *host) farewell(ended *guestv1.Ended) {
	_ = h.conn.NetConn().SetWriteDeadline(time.Now().Add(farewellLimit))
	if h.conn.Send(&guestv1.MachineNote{Note: &guestv1.MachineNote_Ended{Ended: ended}}) != nil {
		return
	}
	select {
	case <-h.gone: // it closes then
	case <-time.After(heardLimit):
	}
}

// heardLimit is how long a shim may take to hear it. On a busy host it takes a
// while, and what it has not heard by the time the machine is off may be lost.
const heardLimit = 10 * time.Second
