package drivertest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
)

func hibernateTests() []test {
	return []test{
		{"HibernateGoesOnOnceWhereItWas", hibernateGoesOn},
		{"HibernateOfWhatCannotBeSavedLeavesItAlone", hibernateOfShares},
		{"DeleteOfHibernated", deleteOfHibernated},
	}
}

func (b *box) tryHibernate() error {
	b.t.Helper()
	return b.do("Hibernate", func(ctx context.Context, d sandbox.Driver) error { return d.(sandbox.Hibernator).Hibernate(ctx, b.ref) })
}

// printer makes and starts a sandbox that prints its lines and has nothing of
// the host's, which might keep it from being saved.
func (b *box) printer() {
	b.t.Helper()
	b.must("Create", b.tryCreate(b.s.Spec(b.t, Workload{Args: []string{"print-loop", "20ms"}})))
	b.start()
	b.printed("line 3")
}

// saved wants a sandbox to have ended, and its memory to be there or not.
func (b *box) saved(want bool) {
	b.t.Helper()
	if o := b.want(sandbox.StateExited); o.Saved != want {
		b.t.Errorf("Inspect says %+v; want Saved: %v", o, want)
	}
}

// rejoin does what the manager does after a Start that went on from what was
// saved.
func (b *box) rejoin() {
	b.t.Helper()
	if b.s.Without.Configure {
		return
	}
	b.generation++
	b.s.eventually(b.t, "its guestd is told of its new life", func() bool {
		return b.do("Rejoin", func(ctx context.Context, d sandbox.Driver) error {
			return guestOf(d, b.ref).Rejoin(ctx, b.generation, []byte("entropy"))
		}) == nil
	})
	a := step(b.t, b.s, b.t.Context(), "Hello", func(ctx context.Context, d sandbox.Driver) (guest.Info, error) {
		return guestOf(d, b.ref).Hello(ctx)
	})
	if a.err != nil || a.value.Phase != guest.PhaseRunning || a.value.Generation != b.generation {
		b.t.Errorf("Hello says %+v, %v; want that it runs in generation %d", a.value, a.err, b.generation)
	}
}

func hibernateGoesOn(t *testing.T, s *suite) {
	b := s.box(t)
	if err := b.tryHibernate(); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("Hibernate of an absent one: %v", err)
	}
	b.printer()
	b.must("Hibernate", b.tryHibernate())
	b.saved(true)
	if err := b.tryHibernate(); !errors.Is(err, sandbox.ErrState) {
		t.Errorf("Hibernate of a hibernated one: %v", err)
	}
	b.saved(true)
	sofar := b.logs(everything())
	if len(sofar) == 0 {
		t.Fatal("it printed nothing")
	}

	b.must("Start", b.tryStart())
	b.want(sandbox.StateRunning)
	b.rejoin()
	b.printed(fmt.Sprintf("line %d", len(sofar)+3))
	// Nothing was lost, nothing came twice, and it did not begin anew.
	printed := map[string]int{}
	for _, l := range b.logs(everything()) {
		printed[l.text]++
	}
	for i := range len(sofar) + 3 {
		if line := fmt.Sprint("line ", i+1); printed[line] != 1 {
			t.Errorf("over its sleep it printed %q %d times", line, printed[line])
		}
	}

	// What was saved is used once: the next life begins from the beginning.
	b.stop(0)
	b.saved(false)
	b.must("Start", b.tryStart())
	b.generation++
	b.configure()
	b.begins(2)

	// And Stop discards it.
	b.must("Hibernate", b.tryHibernate())
	b.saved(true)
	b.stop(0)
	b.saved(false)
	b.start()
	b.begins(3)
}

// begins wants the printer to print its first line for the nth time.
func (b *box) begins(n int) {
	b.t.Helper()
	b.happens(fmt.Sprintf("it begins from the beginning, for the %dth time", n), func() bool {
		return strings.Count(strings.Join(texts(b.logs(everything())), "|")+"|", "line 1|") == n
	})
}

func hibernateOfShares(t *testing.T, s *suite) {
	b := s.box(t)
	life := b.sleeper()
	err := b.tryHibernate()
	if err == nil {
		b.saved(true) // this driver can save that, too
		return
	}
	if !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("Hibernate of one with a mounted folder: %v; want an error that wraps ErrUnsupported", err)
	}
	b.undisturbed(life)
	b.stop(long)
	b.exited(0)
}

func deleteOfHibernated(t *testing.T, s *suite) {
	b := s.box(t)
	b.printer()
	b.must("Hibernate", b.tryHibernate())
	b.delete()
	b.wantGone()
}
