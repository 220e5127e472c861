//go:build linux

package reach

import (
	"context"
	"slices"
	"strings"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

const (
	// maxListeners is how many listeners a message names.
	maxListeners = 256
	// The pause between two looks, soon after the start of a watch and later.
	earlyPause, laterPause = 250 * time.Millisecond, time.Second
	earlyTime              = 10 * time.Second
	// ephemeral is the first port that the kernel picks for those who ask for
	// none (ip_local_port_range in ip(7)).
	ephemeral = 32768
)

// WatchPorts tells on what ports something listens. A UDP socket on a port of
// the kernel's choice is told of when it is seen twice: most are the sending
// side of a short exchange, a name lookup for instance.
func (s *Service) WatchPorts(ctx context.Context, conn *wire.Conn, _ *guestv1.WatchPorts) error {
	w := watch{service: s}
	if _, err := w.look(); err != nil {
		return err
	}
	if err := conn.Send(&guestv1.Response{Protocol: wire.Protocol}); err != nil {
		return err
	}
	defer conn.Bind(ctx)()
	if err := conn.Send(w.ports); err != nil {
		return err
	}
	for start := time.Now(); ; {
		next := laterPause
		if time.Since(start) < earlyTime {
			next = earlyPause
		}
		if err := pause(ctx, next); err != nil {
			return err
		}
		changed, err := w.look()
		if err != nil {
			return err
		}
		if !changed {
			continue
		}
		if err := conn.Send(w.ports); err != nil {
			return err
		}
	}
}

// watch remembers what was seen.
type watch struct {
	service  *Service
	ports    *guestv1.Ports      // as last told
	sockets  []socket            // that this is made of
	passing  map[uint32]struct{} // UDP sockets of the kernel's ports, seen last
	programs map[uint32]string   // by inode
}

// look finds out what listens, and whether that has changed what is to be told.
func (w *watch) look() (changed bool, err error) {
	sockets, err := w.service.sockets(protocolTCP)
	if err != nil {
		return false, err
	}
	udp, err := w.service.sockets(protocolUDP)
	if err != nil {
		return false, err
	}
	sockets = append(sockets, w.settled(udp)...)
	if w.ports != nil && slices.Equal(sockets, w.sockets) {
		return false, nil
	}
	w.sockets = sockets
	w.name()
	ports := w.tell()
	changed = w.ports == nil || ports.GetTruncated() != w.ports.GetTruncated() ||
		!slices.EqualFunc(ports.GetListeners(), w.ports.GetListeners(), sameListener)
	w.ports = ports
	return changed, nil
}

func sameListener(a, b *guestv1.Listener) bool {
	return a.GetAddress() == b.GetAddress() && a.GetPort() == b.GetPort() &&
		a.GetUdp() == b.GetUdp() && a.GetProgram() == b.GetProgram()
}

// settled leaves out sockets that may be gone the next moment.
func (w *watch) settled(sockets []socket) []socket {
	var passing map[uint32]struct{}
	sockets = slices.DeleteFunc(sockets, func(socket socket) bool {
		if socket.port < ephemeral {
			return false
		}
		if passing == nil {
			passing = make(map[uint32]struct{})
		}
		passing[socket.inode] = struct{}{}
		_, seen := w.passing[socket.inode]
		return !seen
	})
	w.passing = passing
	return sockets
}

// name finds the programs of sockets that are new.
func (w *watch) name() {
	known := make(map[uint32]string, len(w.sockets))
	unknown := make(map[uint32]struct{})
	for _, socket := range w.sockets {
		if program, ok := w.programs[socket.inode]; ok {
			known[socket.inode] = program
		} else {
			known[socket.inode] = ""
			unknown[socket.inode] = struct{}{}
		}
	}
	if len(unknown) > 0 {
		findPrograms(unknown, known)
	}
	w.programs = known
}

// tell makes the message of what was seen: one listener for sockets that share
// their port and address, as those of a server with several workers do.
func (w *watch) tell() *guestv1.Ports {
	sockets := slices.Clone(w.sockets)
	slices.SortFunc(sockets, compareSockets)
	sockets = slices.CompactFunc(sockets, func(a, b socket) bool {
		return a.port == b.port && a.udp == b.udp && a.address == b.address
	})
	ports := &guestv1.Ports{Truncated: len(sockets) > maxListeners}
	for _, socket := range sockets[:min(len(sockets), maxListeners)] {
		ports.Listeners = append(ports.Listeners, &guestv1.Listener{
			Address: socket.address.String(),
			Port:    uint32(socket.port),
			Udp:     socket.udp,
			Program: strings.ToValidUTF8(w.programs[socket.inode], "?"),
		})
	}
	return ports
}
