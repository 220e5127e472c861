package vm_test

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/vm"
)

// astray is how far a machine's clock is from the host's: at least that.
func (v *victim) astray() time.Duration {
	v.Helper()
	name := fmt.Sprintf("/tmp/at-%d", time.Now().UnixNano())
	before := time.Now()
	v.run("touch", name)
	after := time.Now()
	file, err := v.guest().Stat(v.Context(), name)
	switch {
	case err != nil:
		v.Fatal(err)
	case file.Modified.Before(before):
		return file.Modified.Sub(before)
	case file.Modified.After(after):
		return file.Modified.Sub(after)
	}
	return 0
}

// right wants the machine's clock to be the host's.
func (v *victim) right(when string) {
	v.Helper()
	if off := v.astray().Abs(); off > time.Second {
		v.Errorf("%s its clock is %s from where it should be", when, off)
	}
}

// behind wants the machine's clock to be wrong, or the test would show nothing.
func (v *victim) behind(when string, by time.Duration) {
	v.Helper()
	if off := v.astray(); off > time.Second-by {
		v.Errorf("%s its clock is %s from where it should be; want it to be %s behind", when, off, by)
	}
}

// setClock sets the machine's clock.
func (v *victim) setClock(t time.Time) {
	v.Helper()
	if err := v.guest().SetTime(v.Context(), t); err != nil {
		v.Fatal(err)
	}
}

// random is a number of the machine's kernel's, which no other has.
func (v *victim) random() string {
	v.Helper()
	return v.run("cat", "/proc/sys/kernel/random/uuid")
}

// sleepingMachine has a machine sleep for what its clock takes for an hour, in
// both ways that there are, and has one memory restored twice, which only a test
// can, for it holds a copy.
func sleepingMachine(t *testing.T, d *vm.Driver, root string) {
	const hour = time.Hour
	v := newVictim(t, d, root, "sleeping", nil, "sleep")
	v.up()
	v.right("at first")

	v.setClock(time.Now().Add(-hour))
	if err := d.Pause(t.Context(), v.ref); err != nil {
		t.Fatal(err)
	}
	if err := d.Resume(t.Context(), v.ref); err != nil {
		t.Fatal(err)
	}
	v.behind("after a pause, before it is told the time,", hour)
	v.setClock(time.Now())
	v.right("after a pause")

	v.setClock(time.Now().Add(-hour))
	v.hibernate()
	copies := t.TempDir()
	kept := []string{v.box("saved"), v.box("saved.json"), v.box("layer.img"), v.key()}
	for _, path := range kept {
		copyFile(t, filepath.Join(copies, filepath.Base(path)), path)
	}
	var before, after [2]string
	for i := range 2 {
		v.start()
		for _, gone := range []string{kept[0], kept[1], kept[3]} {
			if _, err := os.Lstat(gone); err == nil {
				t.Errorf("it runs, and there is %s", gone)
			}
		}
		v.until("its guestd answers", func() bool {
			_, err := v.guest().Hello(t.Context())
			return err == nil
		})
		if i == 0 {
			v.behind("after its sleep, before it rejoins,", hour)
		}
		before[i] = v.random()
		entropy := make([]byte, 32)
		_, _ = rand.Read(entropy) // never fails, see crypto/rand
		if err := v.guest().Rejoin(t.Context(), v.generation, entropy); err != nil {
			t.Fatal(err)
		}
		after[i] = v.random()
		v.right("after its sleep")
		v.answers()
		if i == 0 {
			if err := d.Stop(t.Context(), v.ref, 0); err != nil {
				t.Fatal(err)
			}
			for _, path := range kept {
				copyFile(t, path, filepath.Join(copies, filepath.Base(path)))
			}
			if o := v.inspect(); !o.Saved {
				t.Fatalf("what was saved is back, and it is %+v", o)
			}
		}
	}
	t.Logf("before rejoining: %v; after: %v", before, after)
	if after[0] == after[1] {
		t.Errorf("one memory that was restored twice gave the random number %s twice", after[0])
	}

	// A restart of the host leaves the memory, and nothing to open it with.
	v.hibernate()
	if err := os.Remove(v.key()); err != nil {
		t.Fatal(err)
	}
	if o := v.inspect(); o.State != sandbox.StateExited || o.Saved {
		t.Errorf("a memory without its key: %+v", o)
	}
	v.up()
	v.unsaved()
	v.until("it begins from the beginning", func() bool { return strings.Count(v.printed(), "ready\n") == 2 })
}
