package vm

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"
	"unicode"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/vm/network"
)

// awakeLimit is how long a guest that has connected may take to say who it is.
const awakeLimit = 10 * time.Second

// answerGuest waits for guestd's one connection and serves it until it ends.
// Whoever connects after that is sent away: it is not guestd.
func (l *life) answerGuest(calls net.Listener) {
	raw, err := calls.Accept()
	if err != nil {
		return // the machine has ended
	}
	go func() {
		for {
			stranger, err := calls.Accept()
			if err != nil {
				return
			}
			stranger.Close()
		}
	}()
	conn := wire.New(raw, wire.MaxFromGuest)
	defer conn.Close()
	if err := l.greet(conn); err != nil {
		fmt.Fprintln(os.Stderr, "greet the guest:", err)
		return
	}
	_ = l.hear(conn) // a guest that hangs up: the machine will tell how it ends
}

// greet tells guestd what the machine is to become.
func (l *life) greet(conn *wire.Conn) error {
	_ = conn.NetConn().SetDeadline(time.Now().Add(awakeLimit))
	var awake guestv1.Awake
	if err := conn.ReceiveMessage(&awake); err != nil {
		return err
	}
	if err := conn.Send(l.message()); err != nil {
		return err
	}
	_ = conn.NetConn().SetDeadline(time.Time{})
	l.guest.Store(conn)
	return nil
}

// hear takes what guestd sends until it says that it has ended.
func (l *life) hear(conn *wire.Conn) error {
	for {
		kind, payload, err := conn.Receive()
		if err != nil {
			return err
		}
		switch kind {
		case wire.KindData, wire.KindStderr:
			var output io.Writer = l.output[0]
			if kind == wire.KindStderr {
				output = l.output[1]
			}
			if _, err := output.Write(payload); err != nil {
				return err
			}
		case wire.KindEvent:
			var note guestv1.MachineNote
			if err := wire.Decode(payload, &note); err != nil {
				return err
			}
			if ended := note.GetEnded(); ended != nil {
				l.ended <- ended
				return nil
			}
		default:
			return fmt.Errorf("%w: a frame of kind %d", wire.ErrProtocol, kind)
		}
	}
}

// message is what the machine is to become.
func (l *life) message() *guestv1.Machine {
	m := &guestv1.Machine{Protocol: wire.Protocol, Key: l.key}
	if image := l.plan.Image; image != nil {
		m.Root = &guestv1.Root{ImageSerial: imageSerial, ImageType: "erofs", LayerSerial: layerSerial}
		m.Workload = &guestv1.Workload{
			Command: image.Command, Env: image.Env, User: image.User, WorkingDir: image.WorkingDir,
		}
	} else {
		spec := l.plan.Spec
		m.Workload = &guestv1.Workload{
			Command: append(append([]string{}, spec.Entrypoint...), spec.Command...),
			Env:     spec.Env, User: spec.User, WorkingDir: spec.WorkingDir,
		}
	}
	for _, s := range l.plan.Shares {
		m.Shares = append(m.Shares, &guestv1.Share{Tag: s.Tag, Target: s.Target, ReadOnly: s.ReadOnly})
	}
	for _, d := range l.plan.Disks {
		m.Disks = append(m.Disks, &guestv1.DataDisk{Serial: d.Serial, Target: d.Target, Format: true})
	}
	if l.network != nil {
		m.Network = &guestv1.Network{
			Mac:     guestMAC().String(),
			Address: netip.PrefixFrom(network.Guest, network.PrefixBits).String(), Gateway: network.Gateway.String(),
			Nameservers: []string{network.Gateway.String()}, Mtu: network.DefaultMTU,
		}
	}
	return m
}

// maxText is how much is kept of what a guest says for people, in bytes.
const maxText = 1 << 10

// printable is text of a guest's, fit to be shown.
func printable(s string) string {
	s = strings.ToValidUTF8(s[:min(len(s), maxText)], "?")
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) {
			return ' '
		}
		return r
	}, s)
}
