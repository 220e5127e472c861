package server_test

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/hostclock"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/vm/vmtest"
	"github.com/choiros/agent/test/image"
)

// lines are those of a log that matter here.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	if strings.Contains(string(p), "slept") || strings.Contains(string(p), "cut off") {
		l <- string(p)
	}
	return len(p), nil
}

// hypervisor is the QEMU of the one machine below root.
func hypervisor(t *testing.T, root string) int {
	t.Helper()
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is a good one
	for _, path := range all {
		cmdline, _ := os.ReadFile(path) // it may be gone
		name, args, _ := strings.Cut(string(cmdline), "\x00")
		if strings.HasPrefix(filepath.Base(name), "qemu-system") && strings.Contains(args, root+"/") {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatal("no QEMU")
	return 0
}

// TestMachineOutlivesTheSleepOfItsHost has a machine stand still with a
// connection into it, while the clocks of its host say that this slept, and its
// own lose an hour.
func TestMachineOutlivesTheSleepOfItsHost(t *testing.T) {
	if testing.Short() {
		t.Skip("it boots a machine")
	}
	root := vmtest.Backend(t)
	const hour = time.Hour
	var slept atomic.Int64
	log := make(lines, 16)
	driver := openMachines(t, root)
	agent := startAgent(t, agentOptions{
		Drivers: func(string) map[string]sandbox.Driver { return map[string]sandbox.Driver{"vm": driver} },
		Manager: manager.Config{ClockScan: 50 * time.Millisecond, Clock: func() (hostclock.Reading, error) {
			r, err := hostclock.Read()
			r.Elapsed += time.Duration(slept.Load())
			r.Wall += time.Duration(slept.Load())
			return r, err
		}},
		Log: log,
	})
	client := agentv1.NewSandboxServiceClient(agent.Dial(t))
	created, err := client.CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{
		Sandbox: &agentv1.Sandbox{Name: "sleeper", Spec: &agentv1.SandboxSpec{
			Driver: "vm", Source: &agentv1.SandboxSpec_Image{Image: image.RootName}, Command: []string{"listen", "127.0.0.1:8080"},
			Ports:     []*agentv1.Port{{GuestPort: 8080}},
			Resources: &agentv1.Resources{CpuMillis: 1000, MemoryMib: 192},
			Readiness: &agentv1.Readiness{
				Probe: &agentv1.Readiness_Tcp{Tcp: &agentv1.TcpProbe{Port: 8080}}, Timeout: durationpb.New(5 * time.Minute),
			},
		}},
		Start: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", created.GetSandbox().GetStatus().GetEndpoints()[0].GetAddress())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	echoed := func(when string) {
		t.Helper()
		_ = conn.SetDeadline(time.Now().Add(time.Minute))
		_, err := conn.Write([]byte(when))
		heard := make([]byte, len(when))
		if err == nil {
			_, err = io.ReadFull(conn, heard)
		}
		if err != nil || string(heard) != when {
			t.Fatalf("%s: heard %q, %v", when, heard, err)
		}
	}
	echoed("awake")

	g := guest.New("sleeper", func(ctx context.Context) (net.Conn, error) {
		return driver.Dial(ctx, sandbox.Ref{ID: "sleeper", Dir: agent.Store.SandboxDir("sleeper")}, guest.Port)
	})
	if err := g.SetTime(t.Context(), time.Now().Add(-hour)); err != nil {
		t.Fatal(err)
	}
	qemu := hypervisor(t, root)
	if err := syscall.Kill(qemu, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	slept.Add(int64(hour))
	// It takes a moment to wake, in which it is already asked.
	<-time.After(2 * time.Second)
	if err := syscall.Kill(qemu, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	select {
	case line := <-log:
		t.Log(line)
		for _, want := range []string{"the host slept", "slept=1h0m0s", "clocks_set=1", "guests_silent=0", "connections_closed=0", "ports_listening=1", "ports_rebuilt=0"} {
			if !strings.Contains(line, want) {
				t.Errorf("it lacks %s", want)
			}
		}
	case <-time.After(90 * time.Second):
		t.Fatal("that the host slept is not noticed")
	}
	echoed("after its sleep")

	before := time.Now()
	if err := g.MakeFolder(t.Context(), "/tmp/now", 0o700, true); err != nil {
		t.Fatal(err)
	}
	made, err := g.Stat(t.Context(), "/tmp/now")
	if err != nil || made.Modified.Before(before.Add(-time.Second)) || made.Modified.After(time.Now().Add(time.Second)) {
		t.Errorf("its clock says %s at %s, %v", made.Modified, before, err)
	}
	got, err := client.GetSandbox(t.Context(), &agentv1.GetSandboxRequest{Name: "sleeper"})
	if s := got.GetSandbox().GetStatus(); err != nil || s.GetPhase() != agentv1.Phase_PHASE_READY || s.GetReason() != "" || s.GetGeneration() != 1 {
		t.Errorf("%v, %v", s, err)
	}
	if _, err := client.DeleteSandbox(t.Context(), &agentv1.DeleteSandboxRequest{Name: "sleeper"}); err != nil {
		t.Fatal(err)
	}
	select {
	case line := <-log:
		t.Errorf("it goes on to say: %s", line)
	default:
	}
}
