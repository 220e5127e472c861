package drivertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

func logTests() []test {
	return []test{
		{"LogsKeepStreamsApart", logsKeepStreamsApart},
		{"LogsTail", logsTail},
		{"LogsSince", logsSince},
		{"LogsFollow", logsFollow},
		{"LogsFollowOfExited", logsFollowOfExited},
		{"LogsFollowFromTheEnd", logsFollowFromTheEnd},
		{"LogsCancelled", logsCancelled},
		{"LogsReturnTheErrorOfYield", logsYieldError},
		{"LogsOfLongLinesComeInParts", logsLongLines},
		{"LogsOfRecreatedAreNew", logsOfRecreated},
	}
}

// everything selects all that was printed until now.
func everything() sandbox.LogOptions {
	return sandbox.LogOptions{Tail: -1, Stdout: true, Stderr: true}
}

// line is a line of a log, of however many entries, without the newline.
type line struct {
	text   string
	stderr bool
	at     time.Time // of its first part
}

// maxPart is the most that sandbox.LogEntry allows.
const maxPart = 16 << 10

// lineReader makes lines of entries, and errors of what they may not be.
type lineReader struct {
	lines []line
	raw   [2]bytes.Buffer // by stream
	open  [2]*line        // lines that have not ended, by stream
	last  time.Time
	err   error
}

func (r *lineReader) add(e sandbox.LogEntry) {
	stream := 0
	if e.Stderr {
		stream = 1
	}
	switch newline := bytes.IndexByte(e.Data, '\n'); {
	case len(e.Data) == 0:
		r.err = errors.Join(r.err, errors.New("an entry without data"))
	case len(e.Data) > maxPart:
		r.err = errors.Join(r.err, fmt.Errorf("an entry of %d bytes; at most %d are allowed", len(e.Data), maxPart))
	case newline >= 0 && newline < len(e.Data)-1:
		r.err = errors.Join(r.err, fmt.Errorf("an entry of more than a line: %.80q", e.Data))
	case e.Time.IsZero() || e.Time.Before(r.last):
		r.err = errors.Join(r.err, fmt.Errorf("an entry of %s comes after one of %s", e.Time, r.last))
	}
	r.last = e.Time
	r.raw[stream].Write(e.Data)
	if r.open[stream] == nil {
		r.open[stream] = &line{stderr: e.Stderr, at: e.Time}
	}
	text, ended := strings.CutSuffix(string(e.Data), "\n")
	r.open[stream].text += text
	if ended {
		r.lines = append(r.lines, *r.open[stream])
		r.open[stream] = nil
	}
}

// end returns the lines, and those that did not end after them.
func (r *lineReader) end() []line {
	for _, l := range r.open {
		if l != nil {
			r.lines = append(r.lines, *l)
		}
	}
	r.open = [2]*line{}
	return r.lines
}

// read reads a log to its end.
func (b *box) read(opts sandbox.LogOptions) *lineReader {
	b.t.Helper()
	r := &lineReader{}
	err := b.do("Logs", func(ctx context.Context, d sandbox.Driver) error {
		return d.(sandbox.LogSource).Logs(ctx, b.ref, opts, func(e sandbox.LogEntry) error {
			r.add(e)
			return nil
		})
	})
	b.must("Logs", err)
	b.must("Logs", r.err)
	return r
}

func (b *box) logs(opts sandbox.LogOptions) []line {
	b.t.Helper()
	return b.read(opts).end()
}

func texts(lines []line) []string {
	out := make([]string, 0, len(lines))
	for _, l := range lines {
		out = append(out, l.text)
	}
	return out
}

// numbered returns the lines that print-loop and spew print, from a first to a
// last number.
func numbered(first, last, step int) []string {
	var out []string
	for i := first; i <= last; i += step {
		out = append(out, fmt.Sprintf("line %d", i))
	}
	return out
}

// ended makes a sandbox, and lets it run to its end and until its log has so
// many lines.
func (b *box) ended(lines int, args ...string) {
	b.t.Helper()
	b.create(args...)
	b.start()
	b.wait()
	b.exited(0)
	b.s.eventually(b.t, fmt.Sprintf("the log has %d lines", lines), func() bool { return len(b.logs(everything())) == lines })
}

// prints makes a sandbox that prints a text to stdout, and ends.
func (b *box) prints(text string) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.data, "text"), []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
	b.ended(len(slices.Collect(strings.Lines(text))), "cat", "/data/text")
}

func logsKeepStreamsApart(t *testing.T, s *suite) {
	const n = 200
	b := s.box(t)
	b.ended(n, "spew", fmt.Sprint(n))
	var printed [2][]string
	for _, l := range b.logs(everything()) {
		stream := 0
		if l.stderr {
			stream = 1
		}
		printed[stream] = append(printed[stream], l.text)
	}
	odd, even := numbered(1, n, 2), numbered(2, n, 2)
	if !slices.Equal(printed[0], odd) || !slices.Equal(printed[1], even) {
		t.Errorf("stdout and stderr together are\n%q\n%q", printed[0], printed[1])
	}
	if got := texts(b.logs(sandbox.LogOptions{Tail: -1, Stdout: true})); !slices.Equal(got, odd) {
		t.Errorf("stdout alone is %q", got)
	}
	if got := texts(b.logs(sandbox.LogOptions{Tail: -1, Stderr: true})); !slices.Equal(got, even) {
		t.Errorf("stderr alone is %q", got)
	}
}

func logsTail(t *testing.T, s *suite) {
	want := numbered(1, 50, 1)
	b := s.box(t)
	b.prints(strings.Join(want, "\n") + "\n")
	for _, tail := range []int{-1, 0, 1, 7, 50, 1000} {
		opts := everything()
		opts.Tail = tail
		lines := want
		if tail >= 0 {
			lines = want[max(0, len(want)-tail):]
		}
		if got := texts(b.logs(opts)); !slices.Equal(got, lines) {
			t.Errorf("the last %d lines are %q", tail, got)
		}
	}
	// It counts what is asked for, of both streams together.
	b = s.box(t)
	b.ended(20, "spew", "20")
	if got := b.logs(sandbox.LogOptions{Tail: 5, Stdout: true, Stderr: true}); len(got) != 5 {
		t.Errorf("the last 5 lines of both streams are %q", texts(got))
	}
	if got := texts(b.logs(sandbox.LogOptions{Tail: 5, Stderr: true})); !slices.Equal(got, numbered(12, 20, 2)) {
		t.Errorf("the last 5 lines of stderr are %q", got)
	}
}

func logsSince(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("print-loop", "20ms")
	b.start()
	b.printed("line 9")
	b.stop(long)
	lines := b.logs(everything())
	for _, i := range []int{0, 4, 8} {
		want := slices.DeleteFunc(slices.Clone(lines), func(l line) bool { return l.at.Before(lines[i].at) })
		opts := everything()
		opts.Since = lines[i].at
		if got := texts(b.logs(opts)); !slices.Equal(got, texts(want)) {
			t.Errorf("since line %d was printed: %q, want %q", i, got, texts(want))
		}
	}
	opts := everything()
	opts.Since = time.Now().Add(time.Hour)
	if got := texts(b.logs(opts)); len(got) > 0 {
		t.Errorf("since an hour from now: %q", got)
	}
}

// follow follows a log until call returns, and hands each entry on.
func (b *box) follow(opts sandbox.LogOptions, entries chan<- sandbox.LogEntry) <-chan answer[sandbox.Observation] {
	b.t.Helper()
	opts.Follow = true
	return b.background("Logs", func(ctx context.Context, d sandbox.Driver) (sandbox.Observation, error) {
		defer close(entries)
		return sandbox.Observation{}, d.(sandbox.LogSource).Logs(ctx, b.ref, opts, func(e sandbox.LogEntry) error {
			e.Data = bytes.Clone(e.Data)
			select {
			case entries <- e:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	})
}

// next reads entries until there are so many lines, or the log ends.
func (b *box) next(entries <-chan sandbox.LogEntry, r *lineReader, lines int) (ended bool) {
	b.t.Helper()
	timer := time.NewTimer(b.s.Patience)
	defer timer.Stop()
	for len(r.lines) < lines {
		select {
		case e, more := <-entries:
			if !more {
				return true
			}
			r.add(e)
		case <-timer.C:
			b.t.Fatalf("followed, the log gave %d lines within %s", len(r.lines), b.s.Patience)
		}
	}
	return false
}

func logsFollow(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("print-loop", "10ms")
	b.start()
	entries, r := make(chan sandbox.LogEntry), &lineReader{}
	back := b.follow(everything(), entries)
	if b.next(entries, r, 20) {
		t.Fatalf("following ended while it runs: %v", (<-back).err)
	}
	b.want(sandbox.StateRunning)
	stopping := b.background("Stop", func(ctx context.Context, d sandbox.Driver) (sandbox.Observation, error) {
		return sandbox.Observation{}, d.Stop(ctx, b.ref, long)
	})
	if !b.next(entries, r, 1<<30) {
		t.Error("following never ended")
	}
	b.must("Logs", within(t, s.Patience, back, "Logs").err)
	b.must("Stop", within(t, s.Patience, stopping, "Stop").err)
	b.must("Logs", r.err)
	// All was read: what came while following is what there is.
	got, want := r.end(), b.logs(everything())
	sort := func(lines []line) []string { // by stream: how they mix may differ
		slices.SortStableFunc(lines, func(a, b line) int {
			return map[bool]int{false: 0, true: 1}[a.stderr] - map[bool]int{false: 0, true: 1}[b.stderr]
		})
		return texts(lines)
	}
	if g, w := sort(got), sort(want); !slices.Equal(g, w) {
		t.Errorf("followed, the log is\n%q\nread in one go, it is\n%q", g, w)
	}
	if n := len(want); !slices.Equal(sort(want), append(numbered(1, n, 2), numbered(2, n, 2)...)) {
		t.Errorf("lines are missing or out of order: %q", texts(want))
	}
}

func logsFollowOfExited(t *testing.T, s *suite) {
	b := s.box(t)
	b.ended(4, "spew", "4")
	opts := everything()
	opts.Follow = true
	if got := b.logs(opts); len(got) != 4 {
		t.Errorf("following one that has ended gives %q, want 4 lines", texts(got))
	}
}

func logsFollowFromTheEnd(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("print-loop", "10ms")
	b.start()
	b.printed("line 5")
	seen := len(b.logs(everything()))
	opts := everything()
	opts.Tail = 0
	entries, r := make(chan sandbox.LogEntry), &lineReader{}
	b.follow(opts, entries)
	b.next(entries, r, 3)
	for _, l := range r.lines {
		if slices.Contains(numbered(1, seen, 1), l.text) {
			t.Errorf("followed from the end, when %d lines were printed, the log gives %q", seen, l.text)
		}
	}
}

func logsCancelled(t *testing.T, s *suite) {
	b := s.box(t)
	o := b.sleeper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	opts := everything()
	opts.Follow = true
	time.AfterFunc(100*time.Millisecond, cancel)
	a := step(t, s, ctx, "cancelled Logs", func(ctx context.Context, d sandbox.Driver) (struct{}, error) {
		return struct{}{}, d.(sandbox.LogSource).Logs(ctx, b.ref, opts, func(sandbox.LogEntry) error { return nil })
	})
	if a.err != nil && !errors.Is(a.err, context.Canceled) {
		t.Errorf("cancelled Logs: %v", a.err)
	}
	if a.took > s.soon {
		t.Errorf("Logs took %s, though its context ended after 100 ms", a.took)
	}
	b.undisturbed(o)
}

func logsYieldError(t *testing.T, s *suite) {
	b := s.box(t)
	b.ended(10, "spew", "10")
	enough, calls := errors.New("enough"), 0
	for _, follow := range []bool{false, true} {
		opts := everything()
		opts.Follow, calls = follow, 0
		err := b.do("Logs", func(ctx context.Context, d sandbox.Driver) error {
			return d.(sandbox.LogSource).Logs(ctx, b.ref, opts, func(sandbox.LogEntry) error {
				if calls++; calls == 3 {
					return enough
				}
				return nil
			})
		})
		if !errors.Is(err, enough) || calls != 3 {
			t.Errorf("Logs called yield %d times and returned %v; want 3 and the error of the third", calls, err)
		}
	}
}

func logsLongLines(t *testing.T, s *suite) {
	var long strings.Builder
	for i := 0; long.Len() < 40_000; i++ {
		fmt.Fprintf(&long, "%d, größer; ", i)
	}
	cases := map[string]string{
		"three parts":      long.String() + "\nshort\n",
		"exactly one part": strings.Repeat("x", maxPart-1) + "\nshort\n",
		"one byte more":    strings.Repeat("x", maxPart) + "\nshort\n",
		"never ended":      "line\n" + long.String(),
		"empty lines":      "\n\nline\n\n",
		"not UTF-8":        "\xff\xfe\x80\n\x1b[31mred\n",
	}
	for _, name := range sample(s, slices.Sorted(maps.Keys(cases))) {
		t.Run(name, func(t *testing.T) {
			text := cases[name]
			b := s.box(t)
			b.prints(text)
			r := b.read(everything())
			if got := r.raw[0].String(); got != text {
				t.Errorf("the log has %d bytes, %.60q...; want %d, %.60q...", len(got), got, len(text), text)
			}
		})
	}
}

func logsOfRecreated(t *testing.T, s *suite) {
	b := s.box(t)
	b.ended(6, "spew", "6")
	b.delete()
	b.create("spew", "2")
	if got := b.logs(everything()); len(got) > 0 {
		t.Errorf("one that was made anew and has not run printed %q", texts(got))
	}
	b.start()
	b.wait()
	s.eventually(t, "the log has 2 lines", func() bool { return len(b.logs(everything())) >= 2 })
	if got := b.logs(everything()); len(got) != 2 {
		t.Errorf("the log of one that was made anew is %q", texts(got))
	}
}
