package drivertest

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
)

func guestTests() []test {
	return []test{
		{"GuestAnswers", guestAnswers},
		{"StopOfUnconfigured", stopOfUnconfigured},
		{"DeleteOfUnconfigured", deleteOfUnconfigured},
	}
}

// guestOf is the guestd of a sandbox, reached through one driver.
func guestOf(d sandbox.Driver, ref sandbox.Ref) *guest.Guest {
	return guest.New(ref.ID, func(ctx context.Context) (net.Conn, error) { return d.Dial(ctx, ref, guest.Port) })
}

// boot starts a sandbox and has its guestd start the workload, if it is there
// to do so and the sandbox runs on for so long.
func (b *box) boot() {
	b.t.Helper()
	if b.inspect().State != sandbox.StateRunning {
		b.generation++
	}
	b.must("Start", b.tryStart())
	b.configure()
}

// configure does what the manager does after Start. It returns, too, once the
// sandbox has ended: nobody can tell then whether its workload did or guestd.
func (b *box) configure() {
	b.t.Helper()
	b.must("Configure", b.do("Configure", func(ctx context.Context, d sandbox.Driver) error {
		return b.s.configured(ctx, d, b.ref, b.generation)
	}))
}

// configured is configure for any goroutine.
func (s *suite) configured(ctx context.Context, d sandbox.Driver, ref sandbox.Ref, generation uint64) error {
	if s.Without.Configure {
		return nil
	}
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := guestOf(d, ref).Configure(ctx, guest.Configuration{Generation: generation})
		if err == nil {
			return nil
		}
		// Perhaps it does not listen yet.
		if o, inspected := d.Inspect(ctx, ref); inspected == nil && o.State != sandbox.StateRunning {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not until %w: %w", ctx.Err(), err)
		case <-time.After(pause):
		}
	}
}

// asked makes one call on guestd, through a driver that is opened for it.
func (b *box) asked(what string, call func(ctx context.Context, g *guest.Guest) error) error {
	b.t.Helper()
	return b.do(what, func(ctx context.Context, d sandbox.Driver) error { return call(ctx, guestOf(d, b.ref)) })
}

// greeted waits until guestd says who it is, and wants it to be in a phase.
func (b *box) greeted(phase guest.Phase) {
	b.t.Helper()
	var info guest.Info
	b.happens("guestd answers", func() bool {
		return b.asked("Hello", func(ctx context.Context, g *guest.Guest) (err error) {
			info, err = g.Hello(ctx)
			return err
		}) == nil
	})
	if info.Phase != phase {
		b.t.Errorf("guestd says that it is in phase %d, want %d", info.Phase, phase)
	}
	if phase == guest.PhaseRunning && info.Generation != b.generation {
		b.t.Errorf("guestd says that it is of generation %d, want %d", info.Generation, b.generation)
	}
}

// guestAnswers looks for guestd in two lives of a sandbox. Each call is made
// through a driver of its own.
func guestAnswers(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("ready-after", "0s", "/data/ready")
	for range 2 {
		if err := os.RemoveAll(filepath.Join(b.data, "ready")); err != nil { // an earlier life's
			t.Fatal(err)
		}
		b.must("Start", b.tryStart())
		b.greeted(guest.PhaseWaiting)
		b.generation++
		b.configure()
		b.greeted(guest.PhaseRunning)
		b.configure() // which changes nothing
		b.wrote("ready")
		b.greeted(guest.PhaseRunning)
		b.stop(long)
		b.exited(0)
	}
}

// terminated is the exit code of guestd if SIGTERM ends it.
const terminated = 128 + 15

func stopOfUnconfigured(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("ready-after", "0s", "/data/ready")
	b.must("Start", b.tryStart())
	b.greeted(guest.PhaseWaiting)
	o := b.want(sandbox.StateRunning)
	b.undisturbed(o)
	b.stop(long) // and yet within patience, which is less
	b.exited(terminated)

	// Nor is it any different at once, when guestd may hardly have begun.
	b.must("Start", b.tryStart())
	b.stop(long)
	b.want(sandbox.StateExited)
	b.startSleeper()
	b.stop(long)
	b.exited(0)
}

func deleteOfUnconfigured(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("sleep")
	b.must("Start", b.tryStart())
	b.delete()
	b.wantGone()
}
