//go:build linux

package qemu

import (
	"context"
	"time"

	"github.com/choiros/agent/internal/vm"
)

var _ vm.Staller = (*machine)(nil)

// roomPause is how long a machine for which there was no room halts before it
// tries again.
const roomPause = time.Second

func (m *machine) Stalled() <-chan bool { return m.stalled }

// noteDiskError takes QEMU's word that a disk could not be read or written. Its
// guest is told so, unless it was for want of room: then QEMU has halted, and
// does what it could not do when it goes on (werror=enospc, the default).
func (m *machine) noteDiskError(data map[string]any) {
	if action, _ := data["action"].(string); action != "stop" {
		return
	}
	select {
	case m.full <- struct{}{}:
	default: // it is known
	}
}

// awaitRoom has a machine that has halted for want of room try again until
// there is some.
func (m *machine) awaitRoom() {
	for {
		select {
		case <-m.full:
		case <-m.done:
			return
		}
		m.tellStalled(true)
		for stalled := true; stalled; {
			if !m.sleep(roomPause) {
				return
			}
			m.tryAgain()
			// It takes QEMU a moment to find that there still is none.
			if !m.sleep(roomPause) {
				return
			}
			select {
			case <-m.full:
			default:
				stalled = false
			}
		}
		m.tellStalled(false)
	}
}

// sleep reports whether the machine is still there after a while.
func (m *machine) sleep(pause time.Duration) bool {
	select {
	case <-time.After(pause):
		return true
	case <-m.done:
		return false
	}
}

// tellStalled replaces what nobody has heard yet.
func (m *machine) tellStalled(stalled bool) {
	select {
	case <-m.stalled:
	default:
	}
	m.stalled <- stalled
}

// tryAgain lets QEMU go on, unless somebody has paused the machine meanwhile.
func (m *machine) tryAgain() {
	m.changing.Lock()
	defer m.changing.Unlock()
	if mon, err := m.running(); err == nil && !m.paused {
		_ = mon.run(context.Background(), "cont", nil, nil) // of one that is ending it fails
	}
}
