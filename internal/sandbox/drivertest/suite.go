package drivertest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// suite is a harness at work.
type suite struct {
	Harness
	// soon is how long a call may go on after its context has ended, or when
	// the contract says "at once".
	soon   time.Duration
	prefix string
	count  atomic.Int64
	opener func(t *testing.T) sandbox.Driver
}

func newSuite(t *testing.T, h Harness) *suite {
	t.Helper()
	if h.Patience == 0 {
		h.Patience = time.Minute
	}
	root, err := os.MkdirTemp(h.Root, "dt") // short, for sockets in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(root); err != nil {
			t.Errorf("what the sandboxes wrote cannot be removed: %v", err)
		}
	})
	h.Root = root
	return &suite{
		Harness: h,
		soon:    h.Patience / 4,
		prefix:  "dt" + strings.ToLower(rand.Text()[:6]),
		opener:  h.Open,
	}
}

// times is how often to do what is to be done n times.
func (s *suite) times(n int) int {
	if s.Samples > 0 {
		return min(n, s.Samples)
	}
	return n
}

// sample returns the cases to test of all that there are, from the first to the
// last.
func sample[T any](s *suite, all []T) []T {
	n := s.times(len(all))
	some := make([]T, n)
	for i := range some {
		some[i] = all[i*(len(all)-1)/max(1, n-1)]
	}
	return some
}

func (s *suite) open(t *testing.T) sandbox.Driver {
	t.Helper()
	d := s.opener(t)
	if d == nil {
		t.Fatal("the harness opened a nil driver")
	}
	return d
}

func (s *suite) close(t *testing.T, d sandbox.Driver) {
	t.Helper()
	if c, ok := d.(io.Closer); ok {
		if err := c.Close(); err != nil {
			t.Errorf("close the driver: %v", err)
		}
	}
}

// answer is what a call came back with.
type answer[T any] struct {
	value T
	err   error
	took  time.Duration
}

// async makes a call on a goroutine of its own.
func async[T any](call func() (T, error)) <-chan answer[T] {
	back := make(chan answer[T], 1)
	begun := time.Now()
	go func() {
		value, err := call()
		back <- answer[T]{value, err, time.Since(begun)}
	}()
	return back
}

// within waits for an answer, and fails the test if none comes in time.
func within[T any](t *testing.T, limit time.Duration, back <-chan answer[T], what string) answer[T] {
	t.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case a := <-back:
		return a
	case <-timer.C:
		t.Fatalf("%s did not return within %s", what, limit)
		panic("unreachable")
	}
}

// step makes one call on a driver that is opened for it, and closed after it.
// The call's context ends when patience does, or with parent, or at the latest
// when the call returns.
func step[T any](t *testing.T, s *suite, parent context.Context, what string,
	call func(ctx context.Context, d sandbox.Driver) (T, error),
) answer[T] {
	t.Helper()
	d := s.open(t)
	defer s.close(t, d)
	ctx, cancel := context.WithTimeout(parent, s.Patience)
	defer cancel()
	return within(t, s.Patience+s.soon, async(func() (T, error) { return call(ctx, d) }), what)
}

// do is step for calls that return only an error.
func (s *suite) do(t *testing.T, ctx context.Context, what string,
	call func(ctx context.Context, d sandbox.Driver) error,
) error {
	t.Helper()
	return step(t, s, ctx, what, func(ctx context.Context, d sandbox.Driver) (struct{}, error) {
		return struct{}{}, call(ctx, d)
	}).err
}

// eventually waits for a condition that is soon to be true.
func (s *suite) eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.NewTimer(s.Patience)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("not within %s: %s", s.Patience, what)
		}
	}
}

// list returns the IDs that List finds.
func (s *suite) list(t *testing.T) []string {
	t.Helper()
	a := step(t, s, context.WithoutCancel(t.Context()), "List", func(ctx context.Context, d sandbox.Driver) ([]string, error) {
		return d.List(ctx)
	})
	if a.err != nil {
		t.Fatalf("List: %v", a.err)
	}
	if !slices.IsSorted(a.value) || len(slices.Compact(slices.Clone(a.value))) != len(a.value) {
		t.Errorf("List is not sorted, or names one twice: %q", a.value)
	}
	return a.value
}

func (s *suite) wantNothing(t *testing.T, when string) {
	t.Helper()
	if ids := s.list(t); len(ids) > 0 {
		t.Fatalf("List finds %q %s", ids, when)
	}
}

// box is one sandbox of one test.
type box struct {
	t    *testing.T
	s    *suite
	ref  sandbox.Ref
	data string // a folder that is mounted at /data
	// generation is that of its present life, or of its last.
	generation uint64
}

// box returns a sandbox that does not exist yet, and sees to its end.
func (s *suite) box(t *testing.T) *box {
	t.Helper()
	return s.named(t, fmt.Sprintf("%s-%d", s.prefix, s.count.Add(1)))
}

func (s *suite) named(t *testing.T, id string) *box {
	t.Helper()
	place := fmt.Sprint(s.count.Add(1)) // one ID may have several owners
	b := &box{
		t: t, s: s,
		ref:        sandbox.Ref{ID: id, Dir: filepath.Join(s.Root, "r"+place, id)},
		data:       filepath.Join(s.Root, "d"+place),
		generation: 1,
	}
	for _, dir := range []string{b.ref.Dir, b.data} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(b.cleanUp)
	return b
}

// cleanUp deletes the sandbox, should the test not have, and looks for what
// is left of it.
func (b *box) cleanUp() {
	if err := b.tryDelete(); err != nil {
		b.t.Errorf("clean up: %v", err)
	}
	b.wantGone()
	if err := os.RemoveAll(filepath.Dir(b.ref.Dir)); err != nil {
		b.t.Error(err)
	}
}

func (b *box) wantGone() {
	b.t.Helper()
	b.want(sandbox.StateAbsent)
	if b.listed() {
		b.t.Errorf("%s is deleted, and List finds it", b.ref.ID)
	}
	if b.s.Leaks != nil {
		b.s.Leaks(b.t, b.ref)
	}
}

// spec returns how a workload is run on this driver, with /data mounted.
func (b *box) spec(args ...string) sandbox.Spec {
	b.t.Helper()
	return b.s.Spec(b.t, Workload{
		Args:   args,
		Mounts: []sandbox.Mount{{Kind: sandbox.MountData, Source: b.data, Target: "/data"}},
	})
}

func (b *box) do(what string, call func(ctx context.Context, d sandbox.Driver) error) error {
	b.t.Helper()
	return b.s.do(b.t, context.WithoutCancel(b.t.Context()), what+" of "+b.ref.ID, call)
}

func (b *box) must(what string, err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatalf("%s: %v", what, err)
	}
}

func (b *box) tryCreate(spec sandbox.Spec) error {
	b.t.Helper()
	return b.do("Create", func(ctx context.Context, d sandbox.Driver) error { return d.Create(ctx, b.ref, spec) })
}

func (b *box) tryStart() error {
	b.t.Helper()
	return b.do("Start", func(ctx context.Context, d sandbox.Driver) error { return d.Start(ctx, b.ref) })
}

func (b *box) tryStop(grace time.Duration) error {
	b.t.Helper()
	return b.do("Stop", func(ctx context.Context, d sandbox.Driver) error { return d.Stop(ctx, b.ref, grace) })
}

func (b *box) tryDelete() error {
	b.t.Helper()
	return b.do("Delete", func(ctx context.Context, d sandbox.Driver) error { return d.Delete(ctx, b.ref) })
}

func (b *box) create(args ...string) {
	b.t.Helper()
	b.must("Create", b.tryCreate(b.spec(args...)))
}

// start starts a sandbox and its workload.
func (b *box) start() {
	b.t.Helper()
	b.boot()
}

func (b *box) stop(grace time.Duration) {
	b.t.Helper()
	b.must("Stop", b.tryStop(grace))
}

func (b *box) delete() {
	b.t.Helper()
	b.must("Delete", b.tryDelete())
}

// sleeper makes a sandbox whose workload ends with 0 on SIGTERM, starts it,
// and returns once it would.
func (b *box) sleeper() sandbox.Observation {
	b.t.Helper()
	b.create("ready-after", "0s", "/data/ready")
	return b.startSleeper()
}

func (b *box) startSleeper() sandbox.Observation {
	b.t.Helper()
	// An earlier life's; one that runs already may have written its own.
	if b.inspect().State != sandbox.StateRunning {
		if err := os.Remove(filepath.Join(b.data, "ready")); err != nil && !errors.Is(err, os.ErrNotExist) {
			b.t.Fatal(err)
		}
	}
	b.start()
	b.wrote("ready")
	return b.want(sandbox.StateRunning)
}

// wrote waits until a workload that runs on has written a file in /data.
func (b *box) wrote(name string) {
	b.t.Helper()
	b.happens(fmt.Sprintf("the workload writes /data/%s", name), func() bool {
		_, err := os.Lstat(filepath.Join(b.data, name))
		return err == nil
	})
}

// happens waits for what a workload does that runs on.
func (b *box) happens(what string, condition func() bool) {
	b.t.Helper()
	b.s.eventually(b.t, what, func() bool {
		b.t.Helper()
		o := b.inspect()
		done := condition()
		if !done && o.State != sandbox.StateRunning {
			b.t.Fatalf("%s: it did not, and now is %+v", what, o)
		}
		return done
	})
}

// stubborn makes and starts a sandbox whose workload takes no notice of
// SIGTERM, and returns once that is so.
func (b *box) stubborn() {
	b.t.Helper()
	b.create("ignore-term")
	b.start()
	b.printed("ready")
}

// printed waits until a workload has printed a line that begins with text; of
// a driver that keeps no logs it believes it.
func (b *box) printed(text string) {
	b.t.Helper()
	if b.keepsLogs() {
		b.happens(fmt.Sprintf("the workload prints %q", text), func() bool {
			lines := b.logs(everything())
			return slices.ContainsFunc(lines, func(l line) bool { return strings.HasPrefix(l.text, text) })
		})
	}
}

// inspect asks what is true, and looks whether it makes sense.
func (b *box) inspect() sandbox.Observation {
	b.t.Helper()
	a := step(b.t, b.s, context.WithoutCancel(b.t.Context()), "Inspect of "+b.ref.ID,
		func(ctx context.Context, d sandbox.Driver) (sandbox.Observation, error) { return d.Inspect(ctx, b.ref) })
	b.must("Inspect", a.err)
	b.sensible("Inspect", a.value)
	return a.value
}

func (b *box) wait() sandbox.Observation {
	b.t.Helper()
	a := step(b.t, b.s, context.WithoutCancel(b.t.Context()), "Wait for "+b.ref.ID,
		func(ctx context.Context, d sandbox.Driver) (sandbox.Observation, error) { return d.Wait(ctx, b.ref) })
	b.must("Wait", a.err)
	b.sensible("Wait", a.value)
	return a.value
}

// sensible looks whether the parts of an observation fit each other.
func (b *box) sensible(verb string, o sandbox.Observation) {
	b.t.Helper()
	switch o.State {
	case sandbox.StateAbsent, sandbox.StateCreated:
		if !o.StartedAt.IsZero() {
			b.t.Errorf("%s says %s and started at %s; want no time", verb, o.State, o.StartedAt)
		}
		fallthrough
	case sandbox.StateRunning:
		if !o.FinishedAt.IsZero() || o.ExitCode != 0 || o.OOMKilled {
			b.t.Errorf("%s says %s, and how it ended: %+v", verb, o.State, o)
		}
	case sandbox.StateExited:
		if o.FinishedAt.Before(o.StartedAt) {
			b.t.Errorf("%s says that it finished (%s) before it started (%s)", verb, o.FinishedAt, o.StartedAt)
		}
		if o.ExitCode < 0 || o.ExitCode > 255 {
			b.t.Errorf("%s says exit code %d; want one from 0 to 255", verb, o.ExitCode)
		}
	case sandbox.StateBroken:
	default:
		b.t.Errorf("%s says state %q, which there is not", verb, o.State)
	}
	if (o.State == sandbox.StateRunning || o.State == sandbox.StateExited) && o.StartedAt.IsZero() {
		b.t.Errorf("%s says %s and not since when", verb, o.State)
	}
}

// want fails the test unless Inspect says a state.
func (b *box) want(state sandbox.State) sandbox.Observation {
	b.t.Helper()
	o := b.inspect()
	if o.State != state {
		b.t.Fatalf("Inspect of %s says %s (%+v), want %s", b.ref.ID, o.State, o, state)
	}
	return o
}

// same reports whether two observations say the same, in whatever words.
func same(a, b sandbox.Observation) bool {
	return a.State == b.State && a.StartedAt.Equal(b.StartedAt) && a.FinishedAt.Equal(b.FinishedAt) &&
		a.ExitCode == b.ExitCode && a.OOMKilled == b.OOMKilled
}

// exited fails the test unless Inspect says that it ended with a code.
func (b *box) exited(code int) sandbox.Observation {
	b.t.Helper()
	o := b.want(sandbox.StateExited)
	if o.ExitCode != code {
		b.t.Errorf("Inspect says exit code %d, want %d", o.ExitCode, code)
	}
	return o
}

// undisturbed fails the test unless it still is in the life that was observed.
func (b *box) undisturbed(before sandbox.Observation) {
	b.t.Helper()
	if now := b.inspect(); !same(now, before) {
		b.t.Errorf("it was %+v, and now is %+v; want no change", before, now)
	}
}

func (b *box) listed() bool {
	b.t.Helper()
	return slices.Contains(b.s.list(b.t), b.ref.ID)
}
