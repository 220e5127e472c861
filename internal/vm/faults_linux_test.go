package vm_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/vmtest"
)

// TestFaults has machines die, fall silent, and be short of what they need, and
// wants each to end in one state, with a reason, and with nothing left; and a
// machine beside them to notice nothing.
func TestFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("it boots machines")
	}
	root := vmtest.Backend(t)
	d := open(t, root)
	beside := newVictim(t, d, root, "beside", nil, "sleep")
	before := beside.up()
	// A group, so that there is a moment after all of them.
	t.Run("group", func(t *testing.T) {
		for name, test := range map[string]func(t *testing.T, d *vm.Driver, root string){
			"QEMUDies":           func(t *testing.T, d *vm.Driver, root string) { dies(t, d, root, "qemu-system", "qemu: signal: killed") },
			"VirtiofsdDies":      func(t *testing.T, d *vm.Driver, root string) { dies(t, d, root, "virtiofsd", "virtiofsd") },
			"ShimDies":           func(t *testing.T, d *vm.Driver, root string) { dies(t, d, root, "shim", "its shim was killed") },
			"DeathInHibernation": deathInHibernation,
			"StopOverHibernate":  stopOverHibernate,
			"SilentQEMU":         silentQEMU,
			"SilentVsock":        silentVsock,
			"SleepingMachine":    sleepingMachine,
			"BadKernels":         badKernels,
			"FullDisk":           fullDisk,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				test(t, d, root)
			})
		}
	})
	if now := beside.inspect(); now != before {
		t.Errorf("the machine beside was %+v, and is %+v", before, now)
	}
	beside.answers()
	if err := d.Stop(t.Context(), beside.ref, victimLimit); err != nil {
		t.Error(err)
	}
	beside.exited(0)
}

// dies kills a process of a machine's while that starts, boots, runs and stops.
func dies(t *testing.T, d *vm.Driver, root, name, reason string) {
	data := t.TempDir()
	v := newVictim(t, d, root, "dies-"+name[:4], []sandbox.Mount{{Kind: sandbox.MountData, Source: data, Target: "/data"}}, "ignore-term")

	starting := background(func() error { return d.Start(t.Context(), v.ref) })
	v.signal(name, syscall.SIGKILL)
	v.generation++
	if err := v.returns("Start", starting, time.Minute); err != nil {
		if !strings.Contains(err.Error(), reason) || !strings.HasPrefix(err.Error(), "start "+v.ref.ID+": ") {
			t.Errorf("Start: %v; want %q in it", err, reason)
		}
		if o := v.inspect(); o.State != sandbox.StateCreated {
			t.Errorf("it never ran, and is %+v", o)
		}
		vmtest.CheckNoProcess(t, v.box(""))
	} else {
		v.exited(137, reason)
	}

	v.start()
	if o := v.inspect(); o.State != sandbox.StateRunning || o.Detail != "booting the kernel" {
		t.Errorf("it boots, and is %+v", o)
	}
	v.signal(name, syscall.SIGKILL)
	v.exited(137, reason)

	v.up()
	v.signal(name, syscall.SIGKILL)
	v.exited(137, reason)
	if name == "shim" {
		// As if it was a restart of the host that has killed it.
		v.rewrite("life.json", func(life map[string]any) { life["Boot"] = "another" })
		v.exited(137, "the host was restarted")
	}

	ready := func() int { return strings.Count(v.printed(), "ready\n") }
	before := ready()
	v.up()
	v.until("its workload takes no notice of signals", func() bool { return ready() > before })
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := d.Stop(ctx, v.ref, time.Hour); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Stop of one that takes no notice: %v", err)
	}
	stopping := background(func() error { return d.Stop(t.Context(), v.ref, time.Hour) })
	v.signal(name, syscall.SIGKILL)
	if err := v.returns("Stop", stopping, 10*time.Second); err != nil {
		t.Errorf("Stop: %v", err)
	}
	v.exited(137, reason)
}

// saving starts to hibernate a machine, and returns once its memory is being
// written.
func (v *victim) saving() <-chan error {
	v.Helper()
	done := background(func() error { return v.driver.Hibernate(v.Context(), v.ref) })
	v.until("its memory is being written", func() bool {
		_, err := os.Lstat(v.box("saved"))
		return err == nil
	})
	return done
}

// hibernate saves its memory.
func (v *victim) hibernate() {
	v.Helper()
	if err := v.driver.Hibernate(v.Context(), v.ref); err != nil {
		v.Fatal(err)
	}
	if o := v.inspect(); o.State != sandbox.StateExited || !o.Saved {
		v.Fatalf("it was hibernated, and is %+v", o)
	}
}

// unsaved wants nothing to be left of a memory.
func (v *victim) unsaved() {
	v.Helper()
	for _, path := range []string{v.box("saved"), v.box("saved.json"), v.key()} {
		if _, err := os.Lstat(path); err == nil {
			v.Errorf("left: %s", path)
		}
	}
}

func deathInHibernation(t *testing.T, d *vm.Driver, root string) {
	v := newVictim(t, d, root, "hibernating", nil, "print-loop", "20ms")
	for _, name := range []string{"qemu-system", "shim"} {
		v.up()
		saving := v.saving()
		v.signal(name, syscall.SIGKILL)
		if err := v.returns("Hibernate", saving, 30*time.Second); err == nil || errors.Is(err, sandbox.ErrUnsupported) {
			t.Errorf("Hibernate whose %s was killed: %v", name, err)
		}
		if name == "shim" {
			v.exited(137, "its shim was killed")
			continue // what it had written goes with the next start
		}
		v.exited(137, strings.TrimSuffix(name, "-system"), "killed")
		v.unsaved()
	}
	v.start()
	v.unsaved()
	if err := d.Stop(t.Context(), v.ref, 0); err != nil {
		t.Error(err)
	}
}

// stopOverHibernate has a Stop come while memory is being written: the workload
// is asked all the same, and nothing keeps the grace from running out.
func stopOverHibernate(t *testing.T, d *vm.Driver, root string) {
	v := newVictim(t, d, root, "stopped", nil, "print-loop", "20ms")
	v.up()
	v.until("its workload is there to be asked", func() bool { return strings.Contains(v.printed(), "line 1\n") })
	saving := v.saving()
	begun := time.Now()
	if err := d.Stop(t.Context(), v.ref, time.Minute); err != nil {
		t.Error(err)
	}
	t.Logf("stopped after %s", time.Since(begun))
	if err := v.returns("Hibernate", saving, time.Second); err == nil || !strings.Contains(err.Error(), "it is being stopped") {
		t.Errorf("Hibernate: %v", err)
	}
	v.exited(0) // so it was asked
	v.unsaved()

	v.up()
	saving = v.saving()
	v.signal("qemu-system", syscall.SIGSTOP)
	begun = time.Now()
	if err := d.Stop(t.Context(), v.ref, time.Second); err != nil {
		t.Error(err)
	}
	if took := time.Since(begun); took < time.Second || took > 9*time.Second { // QMP is given up after 10 s
		t.Errorf("Stop with a grace of a second took %s", took)
	}
	if err := v.returns("Hibernate", saving, time.Second); err == nil {
		t.Error("Hibernate of one that was killed meanwhile succeeded")
	}
	v.exited(137, "did not stop within its grace")
	v.unsaved()
}

// silentQEMU is a QEMU that does not answer.
func silentQEMU(t *testing.T, d *vm.Driver, root string) {
	v := newVictim(t, d, root, "silent", nil, "sleep")
	v.up()
	v.signal("qemu-system", syscall.SIGSTOP)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := d.Pause(ctx, v.ref); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Pause: %v", err)
	}
	if o := v.inspect(); o.State != sandbox.StateRunning {
		t.Errorf("it is %+v", o)
	}
	// The Pause goes on, and holds up nobody.
	begun := time.Now()
	if err := d.Stop(t.Context(), v.ref, time.Second); err != nil {
		t.Error(err)
	}
	if took := time.Since(begun); took < time.Second || took > 9*time.Second {
		t.Errorf("Stop took %s", took)
	}
	v.exited(137, "did not stop within its grace")

	v.up()
	v.signal("qemu-system", syscall.SIGSTOP)
	begun = time.Now()
	if err := d.Pause(t.Context(), v.ref); err == nil || !strings.Contains(err.Error(), "no answer for 10s") {
		t.Errorf("Pause: %v", err)
	}
	if took := time.Since(begun); took > victimLimit/4 {
		t.Errorf("Pause took %s", took)
	}
	if o := v.inspect(); o.State != sandbox.StateRunning || o.Paused {
		t.Errorf("it is %+v", o)
	}
	begun = time.Now()
	v.delete()
	if took := time.Since(begun); took > victimLimit/4 {
		t.Errorf("Delete took %s", took)
	}
}

// losesVsock has root inside take the vsock device from its driver.
func (v *victim) losesVsock() {
	v.Helper()
	for n := range 20 {
		ctx, cancel := context.WithTimeout(v.Context(), time.Second)
		defer cancel()
		// The one of them that is the device does not answer any more.
		_, _ = v.guest().Exec(ctx, guest.Command{Args: []string{
			"/workload", "write", "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport/unbind", fmt.Sprint("virtio", n),
		}, NoInput: true})
		if _, err := v.guest().Hello(ctx); err != nil {
			return
		}
	}
	v.Fatal("its guestd still answers")
}

// silentVsock is a machine whose guestd cannot be reached any more, and then
// one whose kernel panics.
func silentVsock(t *testing.T, d *vm.Driver, root string) {
	v := newVictim(t, d, root, "wedged", nil, "sleep")
	v.up()
	v.losesVsock()
	begun := time.Now()
	if err := d.Stop(t.Context(), v.ref, time.Second); err != nil {
		t.Error(err)
	}
	if took := time.Since(begun); took < time.Second || took > 9*time.Second {
		t.Errorf("Stop took %s", took)
	}
	v.exited(137, "did not stop within its grace")
	v.up()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	// It may be too late for an answer.
	_, _ = v.guest().Exec(ctx, guest.Command{Args: []string{"/workload", "write", "/proc/sysrq-trigger", "c"}, NoInput: true})
	v.exited(137, "the guest ended with guest-reset", "Kernel panic")
}
