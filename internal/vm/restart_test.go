package vm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/shim"
)

// rebooter is a machine that its guest can restart, of which no more is asked
// than whether somebody listens inside.
type rebooter struct {
	Machine
	from     uint32
	deaf     atomic.Bool
	dials    atomic.Int32
	done     chan struct{}
	answered chan struct{} // closed by whoever wants no more of silence
}

func (r *rebooter) SourcePort(net.Conn) uint32 { return r.from }

func (r *rebooter) Done() <-chan struct{} { return r.done }

func (r *rebooter) Kill() error {
	close(r.done)
	return nil
}

func (r *rebooter) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	r.dials.Add(1)
	if port == wire.Port && !r.deaf.Load() {
		ours, theirs := net.Pipe()
		theirs.Close()
		return ours, nil
	}
	select {
	case <-r.answered:
		return nil, ErrNoListener
	case <-ctx.Done(): // a guest that says nothing
		return nil, ctx.Err()
	}
}

func newRebooter() *rebooter {
	return &rebooter{from: 1, done: make(chan struct{}), answered: make(chan struct{})}
}

// calledLife is a life in which guestd has called.
func calledLife(t *testing.T, machine Machine) (*life, *wire.Conn) {
	t.Helper()
	l := &life{
		Shim: &shim.Shim{}, machine: machine, key: bytes.Repeat([]byte("k"), keyBytes),
		rebooted: make(chan struct{}, 1), lost: make(chan string, 1), called: make(chan struct{}, 1),
	}
	guest, err := callLife(l, &guestv1.Awake{Boot: "first"})
	if err != nil {
		t.Fatal(err)
	}
	<-l.called // and it is known
	return l, guest
}

// callLife calls a life's shim, and returns the connection if that has answered.
func callLife(l *life, awake *guestv1.Awake) (*wire.Conn, error) {
	ours, theirs := net.Pipe()
	go l.answer(wire.New(theirs, wire.MaxFromGuest))
	guest := wire.New(ours, wire.MaxFrame)
	var m guestv1.Machine
	err := guest.Send(awake)
	if err == nil {
		err = guest.ReceiveMessage(&m)
	}
	if err != nil {
		ours.Close()
	}
	return guest, err
}

func TestGuestThatCallsAnewHasRestarted(t *testing.T) {
	t.Parallel()
	key := bytes.Repeat([]byte("k"), keyBytes)
	for name, tc := range map[string]struct {
		awake     *guestv1.Awake
		from      uint32
		ends      bool
		answered  bool
		noReboots bool
	}{
		"another boot":               {awake: &guestv1.Awake{Boot: "second"}, from: 1023, ends: true},
		"a guestd that knows no":     {awake: &guestv1.Awake{}, from: 1, ends: true},
		"an unprivileged program":    {awake: &guestv1.Awake{Boot: "second"}, from: 1024},
		"one that cannot be told":    {awake: &guestv1.Awake{Boot: "second"}, from: 1<<32 - 1},
		"guestd, started once more":  {awake: &guestv1.Awake{Boot: "first"}, from: 1},
		"a key that is wrong":        {awake: &guestv1.Awake{Boot: "second", Key: []byte("k")}, from: 1},
		"guestd, that has lost it":   {awake: &guestv1.Awake{Boot: "first", Key: key}, from: 50000, answered: true},
		"a machine that ends itself": {awake: &guestv1.Awake{Boot: "second"}, from: 1, noReboots: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			machine := newRebooter()
			var m Machine = machine
			if tc.noReboots {
				m = struct{ Machine }{machine}
			}
			l, guest := calledLife(t, m)
			defer guest.NetConn().Close()
			machine.from = tc.from
			again, err := callLife(l, tc.awake)
			if err == nil {
				again.NetConn().Close()
			}
			if (err == nil) != tc.answered {
				t.Errorf("it was answered: %v", err)
			}
			// It is said before the connection ends.
			if ends := len(l.rebooted) == 1; ends != tc.ends {
				t.Errorf("the machine is to end: %t", ends)
			}
		})
	}
}

func TestGuestThatRestartsWithoutGuestdEndsByTheTimeOfABoot(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		machine := newRebooter()
		l, guest := calledLife(t, machine)
		defer guest.NetConn().Close()
		l.plan.Spec.Readiness = sandbox.Readiness{Timeout: 3 * time.Minute}
		go l.look()
		time.Sleep(time.Hour)
		if len(l.lost) > 0 || machine.dials.Load() == 0 {
			t.Fatalf("one that is there, after %d looks: %d", machine.dials.Load(), len(l.lost))
		}
		pause(l, true)
		machine.deaf.Store(true)
		time.Sleep(time.Hour)
		if len(l.lost) > 0 {
			t.Fatal("one that is paused is lost")
		}
		pause(l, false)
		time.Sleep(50 * time.Second)
		machine.deaf.Store(false) // a guest that was busy
		time.Sleep(lookInterval)
		machine.deaf.Store(true)
		begun := time.Now()
		why := <-l.lost
		if took := time.Since(begun); took < 3*time.Minute || took > 3*time.Minute+4*lookInterval {
			t.Errorf("it took %v", took)
		}
		if !strings.Contains(why, "not there for 3m0s") || !strings.Contains(why, "restarted without it") {
			t.Errorf("it is said to be lost since %q", why)
		}
	})
}

func pause(l *life, paused bool) {
	l.changing.Lock()
	defer l.changing.Unlock()
	l.paused = paused
}

func TestLookingEndsWithTheMachine(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		machine := newRebooter()
		l, guest := calledLife(t, machine)
		defer guest.NetConn().Close()
		machine.deaf.Store(true)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			l.look()
		}()
		time.Sleep(lookInterval + time.Second)
		close(machine.answered)
		if err := machine.Kill(); err != nil {
			t.Fatal(err)
		}
		<-ended
	})
}

// TestLastWordsOfABootAreThoseBeforeTheNext is of a console on which the next
// boot has said a lot by the time that the end comes.
func TestLastWordsOfABootAreThoseBeforeTheNext(t *testing.T) {
	t.Parallel()
	chatter := strings.Repeat("[    0.100000] pci 0000:00:01.0\n", maxLastWords/16)
	for name, tc := range map[string]struct{ said, want string }{
		"a panic":       {"[ 9.0] Kernel panic - not syncing: \x1bc\r\n" + chatter, "[ 9.0] Kernel panic - not syncing:  c"},
		"a restart":     {chatter + "[ 9.0] reboot: Restarting system\n" + chatter + "guestd: trouble\n", "[ 9.0] reboot: Restarting system"},
		"guestd, of it": {"guestd: long ago\n" + chatter + "guestd: trouble\nlast\n", "guestd: trouble"},
		"no mark":       {chatter + "last\n\n", "last"},
		"nothing":       {"", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := openConsole(filepath.Join(t.TempDir(), consoleFile))
			if err != nil {
				t.Fatal(err)
			}
			defer c.close()
			if _, err := io.WriteString(c.theirs, tc.said); err != nil && !errors.Is(err, os.ErrClosed) {
				t.Fatal(err)
			}
			if got := c.lastWords(); got != tc.want {
				t.Errorf("%q, want %q", got, tc.want)
			}
		})
	}
}
