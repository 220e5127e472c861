package vm

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/vm/network"
)

// awakeLimit is how long a guest that has connected may take to say who it is.
const awakeLimit = 10 * time.Second

// maxCallers bounds who may call at a time; all but one are not guestd.
const maxCallers = 16

// answerGuest answers whoever calls until the machine ends, and returns once
// all that was sent by then was heard.
func (l *life) answerGuest(calls net.Listener) {
	var callers sync.WaitGroup
	defer callers.Wait()
	turns := make(chan struct{}, maxCallers)
	for {
		raw, err := calls.Accept()
		if err != nil {
			return // the machine has ended
		}
		select {
		case turns <- struct{}{}:
		default:
			raw.Close()
			continue
		}
		callers.Go(func() {
			defer func() { <-turns }()
			l.answer(wire.New(raw, wire.MaxFromGuest))
		})
	}
}

// answer serves guestd's connection until it ends, and closes anybody else's.
func (l *life) answer(conn *wire.Conn) {
	defer conn.Close()
	if err := l.greet(conn); err != nil {
		fmt.Fprintln(os.Stderr, "greet the guest:", err)
		return
	}
	select {
	case l.called <- struct{}{}:
	default:
	}
	_ = l.hear(conn) // a guest that hangs up: it calls again, or the machine will tell how it ends
}

// greet tells guestd what the machine is to become, or, if it calls again, what
// key it has now. The first to call is guestd, since nothing else runs yet;
// after that it has to show that it is.
func (l *life) greet(conn *wire.Conn) error {
	_ = conn.NetConn().SetDeadline(time.Now().Add(awakeLimit))
	var awake guestv1.Awake
	if err := conn.ReceiveMessage(&awake); err != nil {
		return err
	}
	before := l.guest.Load()
	again := before != nil || l.savedKey != nil
	if again && !l.knows(awake.GetKey()) {
		if l.restarted(conn.NetConn(), &awake) {
			select {
			case l.rebooted <- struct{}{}:
			default: // it has so before
			}
			return errors.New("the guest has restarted")
		}
		return errors.New("it does not know the machine's key")
	}
	answer := &guestv1.Machine{Protocol: wire.Protocol, Key: l.key}
	if !again {
		answer = l.message()
	}
	if err := conn.Send(answer); err != nil {
		return err
	}
	_ = conn.NetConn().SetDeadline(time.Time{})
	if again {
		l.progress("")
	}
	if !l.guest.CompareAndSwap(before, conn) {
		return errors.New("another called meanwhile")
	}
	boot := awake.GetBoot()
	l.booted.Store(&boot)
	if before != nil {
		before.Close()
	}
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
			if stage, ok := note.GetNote().(*guestv1.MachineNote_Stage); ok {
				l.progress(printable(stage.Stage))
			}
			if note.GetHeld() {
				select {
				case l.held <- struct{}{}:
				default:
				}
			}
			if ended := note.GetEnded(); ended != nil {
				select {
				case l.ended <- ended:
				default: // it has said so before
				}
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
		if image.rosetta(l.boot.Arch) {
			m.Rosetta = &guestv1.Rosetta{Tag: RosettaTag}
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
	switch {
	case l.boot.NAT:
		m.Network = &guestv1.Network{Mac: l.mac().String(), Dhcp: true}
	case l.network != nil:
		m.Network = &guestv1.Network{
			Mac:     l.mac().String(),
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
