package drivertest

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// long is a grace that no passing test uses up.
const long = 10 * time.Minute

func probe(t *testing.T, s *suite) {
	a := step(t, s, t.Context(), "Probe", func(ctx context.Context, d sandbox.Driver) (sandbox.Report, error) {
		return d.Probe(ctx)
	})
	if a.err != nil {
		t.Fatalf("Probe: %v; the harness is to skip or fail where the backend is missing", a.err)
	}
	if a.value.Version == "" {
		t.Error("Probe says no version")
	}
	for _, warning := range a.value.Warnings {
		if strings.TrimSpace(warning) == "" {
			t.Errorf("Probe has an empty warning: %q", a.value.Warnings)
		}
	}
}

func lifecycle(t *testing.T, s *suite) {
	b := s.box(t)
	b.want(sandbox.StateAbsent)

	b.create("ready-after", "0s", "/data/ready")
	b.want(sandbox.StateCreated)
	if !b.listed() {
		t.Error("it is created, and List does not find it")
	}

	// A second of tolerance: some backends count in those.
	before := time.Now().Add(-time.Second)
	first := b.startSleeper()
	if after := time.Now().Add(time.Second); first.StartedAt.Before(before) || first.StartedAt.After(after) {
		t.Errorf("it started at %s, want from %s to %s", first.StartedAt, before, after)
	}
	if !b.listed() {
		t.Error("it runs, and List does not find it")
	}

	b.stop(long)
	end := b.exited(0)
	if !end.StartedAt.Equal(first.StartedAt) {
		t.Errorf("the life that ended began at %s, want %s", end.StartedAt, first.StartedAt)
	}
	if !b.listed() {
		t.Error("it has stopped, and List does not find it")
	}

	second := b.startSleeper()
	if !second.StartedAt.After(first.StartedAt) {
		t.Errorf("the second life began at %s, the first at %s", second.StartedAt, first.StartedAt)
	}
	b.stop(0)
	b.exited(137)

	b.delete()
	b.wantGone()
}

func everyVerbTwice(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("ready-after", "0s", "/data/ready")
	b.create("ready-after", "0s", "/data/ready")
	b.want(sandbox.StateCreated)

	started := b.startSleeper()
	b.start()
	b.undisturbed(started)

	b.stop(long)
	stopped := b.exited(0)
	b.stop(0)
	if again := b.exited(0); !again.FinishedAt.Equal(stopped.FinishedAt) {
		t.Errorf("it finished at %s, and at %s after a second Stop", stopped.FinishedAt, again.FinishedAt)
	}

	b.delete()
	b.delete()
	b.wantGone()
}

func createKeepsWhatExists(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("exit", "7")
	b.create("exit", "9")
	b.want(sandbox.StateCreated)
	b.start()
	if o := b.wait(); o.ExitCode != 7 {
		t.Errorf("a second Create changed what the first had made: exit code %d, want 7", o.ExitCode)
	}
	b.create("exit", "9")
	b.exited(7)

	running := s.box(t)
	o := running.sleeper()
	running.create("exit", "9")
	running.undisturbed(o)
}

// absentTests looks at what each verb makes of a sandbox that is not there.
func absentTests(b *box) {
	t := b.t
	b.want(sandbox.StateAbsent)
	for _, grace := range []time.Duration{0, long} {
		if err := b.tryStop(grace); err != nil {
			t.Errorf("Stop of an absent one: %v, want success", err)
		}
	}
	if err := b.tryDelete(); err != nil {
		t.Errorf("Delete of an absent one: %v, want success", err)
	}
	if err := b.tryStart(); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("Start of an absent one: %v, want an error that wraps ErrNotFound", err)
	} else if strings.Count(err.Error(), b.ref.ID) != 1 {
		t.Errorf("Start of an absent one: %q, want an error that names it once", err)
	}
	if o := b.wait(); o.State != sandbox.StateAbsent {
		t.Errorf("Wait for an absent one says %+v, want absent", o)
	}
	if !b.s.Without.Dial {
		b.wantNoDial()
	}
	// None of that made anything.
	b.wantGone()
}

func absent(t *testing.T, s *suite) { absentTests(s.box(t)) }

// absentWithoutFolder is what an agent finds that was killed between Delete
// and forgetting about the sandbox.
func absentWithoutFolder(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("sleep")
	b.delete()
	if err := os.RemoveAll(b.ref.Dir); err != nil {
		t.Fatal(err)
	}
	absentTests(b)
	if _, err := os.Lstat(b.ref.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the folder of an absent one was made: %v", err)
	}
}

func recreateHasNoTrace(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("exit", "7")
	b.start()
	b.wait()
	b.exited(7)
	b.delete()
	b.wantGone()

	b.create("exit", "9")
	b.want(sandbox.StateCreated)
	if o := b.wait(); o.State != sandbox.StateCreated {
		t.Errorf("Wait says %+v of one that was made anew; want created", o)
	}
	b.start()
	b.wait()
	b.exited(9)
}

func names(t *testing.T, s *suite) {
	// What an owner has is his own, so short names clash with nobody.
	for _, id := range sample(s, []string{
		"x", "0", "x-", "x--y", "0123456789",
		s.prefix + strings.Repeat("z", 63-len(s.prefix)),
	}) {
		t.Run(id, func(t *testing.T) {
			b := s.named(t, id)
			b.create("exit", "3")
			if !b.listed() {
				t.Error("List does not find it")
			}
			b.start()
			b.wait()
			b.exited(3)
			b.delete()
			b.wantGone()
		})
	}
}

func similarNames(t *testing.T, s *suite) {
	short := s.box(t)
	longer := s.named(t, short.ref.ID+"-1")
	o := longer.sleeper()
	short.want(sandbox.StateAbsent)
	short.delete()
	longer.undisturbed(o)

	short.create("sleep")
	longer.delete()
	longer.want(sandbox.StateAbsent)
	short.want(sandbox.StateCreated)
	if !short.listed() {
		t.Error("List does not find the one whose longer namesake was deleted")
	}
}

func argumentsArrive(t *testing.T, s *suite) {
	for _, text := range sample(s, []string{
		"plain",
		"spaces  and\ttabs",
		"größer, 日本語, \U0001f980",
		`"quotes" 'and' \backslashes\ $HOME ${HOME} $(id) %s %n`,
		"two\nlines",
	}) {
		b := s.box(t)
		b.create("write", "/data/näme", text)
		b.start()
		var got []byte
		b.happens("the workload writes /data/näme", func() bool {
			got, _ = os.ReadFile(filepath.Join(b.data, "näme"))
			return len(got) > 0
		})
		if want := text + "\n"; string(got) != want {
			t.Errorf("the workload was given %q, want %q", got, want)
		}
	}
}

func deleteOfRunning(t *testing.T, s *suite) {
	for name, run := range map[string]func(b *box){
		"sleeper":  func(b *box) { b.sleeper() },
		"stubborn": (*box).stubborn,
	} {
		t.Run(name, func(t *testing.T) {
			b := s.box(t)
			run(b)
			b.delete()
			b.wantGone()
		})
	}
}

func deleteLeavesMounts(t *testing.T, s *suite) {
	b := s.box(t)
	workspace := filepath.Join(b.data, "..", "w"+b.ref.ID)
	for path, content := range map[string]string{
		filepath.Join(b.data, "kept"):            "data",
		filepath.Join(b.data, "folder", "kept"):  "deeper",
		filepath.Join(workspace, "main.go"):      "source",
		filepath.Join(workspace, ".git", "HEAD"): "ref",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("kept", filepath.Join(b.data, "link")); err != nil {
		t.Fatal(err)
	}
	spec := s.Spec(t, Workload{Args: []string{"write", "/data/written", "text"}, Mounts: []sandbox.Mount{
		{Kind: sandbox.MountData, Source: b.data, Target: "/data"},
		{Kind: sandbox.MountWorkspace, Source: workspace, Target: "/workspace"},
	}})
	b.must("Create", b.tryCreate(spec))
	b.start()
	b.happens("the workload writes text", func() bool {
		text, err := os.ReadFile(filepath.Join(b.data, "written"))
		return err == nil && len(text) > 0
	})
	want := tree(t, b.data, workspace)
	b.delete()
	if got := tree(t, b.data, workspace); !maps.Equal(got, want) {
		t.Errorf("the mounted folders had\n%v\nand after Delete have\n%v",
			slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(got)))
	}
}

// tree returns the mode and size of every file below some folders.
func tree(t *testing.T, roots ...string) map[string]string {
	t.Helper()
	files := map[string]string{}
	for _, root := range roots {
		err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // which shows
			}
			if err != nil {
				return err
			}
			info, err := entry.Info()
			if err != nil {
				return err
			}
			files[path] = info.Mode().String()
			if info.Mode().IsRegular() {
				content, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				files[path] += " " + string(content)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return files
}

func listFindsEveryState(t *testing.T, s *suite) {
	created, running, exited, deleted := s.box(t), s.box(t), s.box(t), s.box(t)
	created.create("sleep")
	running.create("sleep")
	running.start()
	exited.create("exit", "1")
	exited.start()
	exited.wait()
	deleted.create("sleep")
	deleted.delete()
	ids := s.list(t)
	for _, b := range []*box{created, running, exited} {
		if !slices.Contains(ids, b.ref.ID) {
			t.Errorf("List does not find %s, which is %s", b.ref.ID, b.inspect().State)
		}
	}
	if slices.Contains(ids, deleted.ref.ID) {
		t.Error("List finds one that was deleted")
	}
}

// ownersAreApart has two owners with a sandbox of the same name each.
func ownersAreApart(t *testing.T, s *suite) {
	other := &suite{Harness: s.Harness, soon: s.soon, prefix: s.prefix}
	other.count.Store(1 << 20)
	other.opener = func(t *testing.T) sandbox.Driver { return s.OpenAs(t, "other") }
	other.wantNothing(t, "for an owner who has made nothing")

	ours := s.box(t)
	theirs := other.named(t, ours.ref.ID)
	o := ours.sleeper()
	theirs.want(sandbox.StateAbsent)
	if err := theirs.tryStart(); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("Start of another owner's: %v, want an error that wraps ErrNotFound", err)
	}
	theirs.stop(0)
	theirs.delete()
	ours.undisturbed(o)

	theirs.create("exit", "5")
	theirs.start()
	theirs.wait()
	theirs.exited(5)
	foreign := other.box(t)
	foreign.create("sleep")
	if foreign.listed(); slices.Contains(s.list(t), foreign.ref.ID) {
		t.Error("List finds a sandbox of another owner")
	}
	if !slices.Contains(other.list(t), foreign.ref.ID) {
		t.Error("List does not find the other owner's sandbox for him")
	}
	ours.undisturbed(o)
	ours.delete()
	theirs.exited(5)
}
