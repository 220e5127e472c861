//go:build linux

package guestd

import (
	"context"
	"fmt"
	"sync"
	"syscall"
	"time"

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
	// callAgainLimit is for how long a shim that has hung up is called again.
	callAgainLimit = 20 * time.Second
	// maxOrders is how many signals may wait to be obeyed.
	maxOrders = 16
)

// host is guestd's connection to the shim that owns the machine. It breaks when
// the machine's memory is saved, and then there is another.
type host struct {
	// rekey is told the key that connections begin with from now on.
	rekey func(key []byte)
	// orders are signals, as if guestd had been sent them.
	orders chan syscall.Signal
	// gone is closed once there is no shim any more.
	gone chan struct{}

	// mu is held while something is sent, and while nothing may be.
	mu     sync.Mutex
	conn   *wire.Conn
	broken chan struct{} // closed once the shim has hung up on conn

	key []byte // of the life; whoever calls needs it
}

// callHost calls the shim, and returns what the machine is to become.
func callHost(ctx context.Context, rekey func([]byte)) (*host, *guestv1.Machine, error) {
	h := &host{rekey: rekey, orders: make(chan syscall.Signal, maxOrders), gone: make(chan struct{})}
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	plan, err := h.call(ctx)
	return h, plan, err
}

// call connects, and says who it is that calls.
func (h *host) call(ctx context.Context) (*guestv1.Machine, error) {
	port, err := machine.HostPort(hostPort)
	if err != nil {
		return nil, fmt.Errorf("find out where to call the host: %w", err)
	}
	raw, err := dialHost(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("call the host: %w", err)
	}
	conn := wire.New(raw, wire.MaxFrame)
	deadline, _ := ctx.Deadline()
	_ = raw.SetDeadline(deadline)
	var m guestv1.Machine
	if err = conn.Send(&guestv1.Awake{Protocol: wire.Protocol, Version: version.String(), Key: h.key, Boot: bootID()}); err == nil {
		err = conn.ReceiveMessage(&m)
	}
	if err != nil {
		raw.Close()
		return nil, fmt.Errorf("ask the host what the machine is to become: %w", err)
	}
	_ = raw.SetDeadline(time.Time{})
	h.conn, h.broken, h.key = conn, make(chan struct{}), m.GetKey()
	h.rekey(h.key)
	return &m, nil
}

// callAgain calls until a shim answers, and reports whether one does.
func (h *host) callAgain(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, callAgainLimit)
	defer cancel()
	for {
		_, err := h.call(ctx)
		if err == nil {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// follow takes orders until there is nobody left to give them, or ctx ends.
func (h *host) follow(ctx context.Context) {
	defer close(h.gone)
	for {
		held := h.obey()
		close(h.broken)
		if ctx.Err() != nil {
			return
		}
		if !held {
			h.mu.Lock()
		}
		_ = h.conn.NetConn().Close()
		again := h.callAgain(ctx)
		h.mu.Unlock()
		if !again {
			return
		}
	}
}

// obey takes orders until the connection ends, and reports whether nothing may
// be sent as yet: h.mu is locked then.
func (h *host) obey() (held bool) {
	for {
		var order guestv1.MachineOrder
		if err := h.conn.ReceiveMessage(&order); err != nil {
			return held
		}
		switch order.GetAction() {
		case guestv1.MachineOrder_ACTION_HOLD:
			if !held {
				h.mu.Lock()
				held = true
			}
			machine.Settle()
			_ = h.conn.Send(&guestv1.MachineNote{Note: &guestv1.MachineNote_Held{Held: true}}) // or it breaks
		case guestv1.MachineOrder_ACTION_GO_ON:
			if held {
				h.mu.Unlock()
				held = false
			}
		case guestv1.MachineOrder_ACTION_UNSPECIFIED:
		}
		number := order.GetSignal()
		if number < 1 || number > maxSignal {
			continue
		}
		select {
		case h.orders <- syscall.Signal(number):
		default: // nobody obeys any more
		}
	}
}

// send sends a note, once that may be.
func (h *host) send(note *guestv1.MachineNote) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.conn.Send(note)
}

// stage tells people what is being done. That nobody hears it shows elsewhere.
func (h *host) stage(what string) {
	_ = h.send(&guestv1.MachineNote{Note: &guestv1.MachineNote_Stage{Stage: what}})
}

// take sends what the workload prints.
func (h *host) take(kind wire.Kind, data []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	_ = h.conn.SendData(kind, data)
}

// farewell says how it ended, and returns once the shim has heard it.
func (h *host) farewell(ended *guestv1.Ended) {
	h.mu.Lock()
	conn, broken := h.conn, h.broken
	_ = conn.NetConn().SetWriteDeadline(time.Now().Add(farewellLimit))
	err := conn.Send(&guestv1.MachineNote{Note: &guestv1.MachineNote_Ended{Ended: ended}})
	h.mu.Unlock()
	if err != nil {
		return
	}
	select {
	case <-broken: // it hangs up then
	case <-time.After(heardLimit):
	}
}

// heardLimit is how long a shim may take to hear it. On a busy host it takes a
// while, and what it has not heard by the time the machine is off may be lost.
const heardLimit = 10 * time.Second
