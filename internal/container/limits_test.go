//go:build hosttest

package container

import (
	"testing"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/test/image"
)

// TestLimitsHold needs a host whose cgroups are delegated to the user, which
// test/env/host-test boots; hence the build tag.
func TestLimitsHold(t *testing.T) {
	t.Parallel()
	d := backend(t)
	report, err := d.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if report.Limits != (sandbox.Limits{CPU: true, Memory: true, Pids: true}) {
		t.Fatalf("this host enforces %+v only: %q", report.Limits, report.Warnings)
	}
	b := newBox(t, d)
	spec := program(image.RootName, "limits")
	spec.Resources = sandbox.Resources{CPUMillis: 500, MemoryMiB: 64, Pids: 50}
	want := func(memory, pids, cpu string) {
		t.Helper()
		b.startAgain(guest.Configuration{})
		if o, err := d.Wait(t.Context(), b.ref); err != nil || o.ExitCode != 0 {
			t.Fatalf("%+v, %v", o, err)
		}
		got := values(b.output()) // the last life's are last
		if got["memory.max"] != memory || got["pids.max"] != pids || got["cpu.max"] != cpu {
			t.Errorf("limits are %q, want %s, %s, %s", got, memory, pids, cpu)
		}
	}
	b.must("Create", d.Create(t.Context(), b.ref, spec))
	want("67108864", "50", "50000 100000")
	b.must("Resize", d.Resize(t.Context(), b.ref, sandbox.Resources{CPUMillis: 1500, MemoryMiB: 128, Pids: 70}))
	want("134217728", "70", "150000 100000")
	b.must("Resize", d.Resize(t.Context(), b.ref, sandbox.Resources{}))
	want("max", "max", "102400000 100000") // more than there is

	greedy := newBox(t, d)
	spec = program(image.RootName, "memory", "200")
	spec.Resources = sandbox.Resources{MemoryMiB: 32}
	greedy.start(spec)
	if o, err := d.Wait(t.Context(), greedy.ref); err != nil || !o.OOMKilled || o.ExitCode != 137 {
		t.Errorf("one that takes too much: %+v, %v; want that it was killed for it", o, err)
	}
}
