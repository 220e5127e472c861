package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/test/image"
)

// Every figure here is of a real agent process over its unix socket. A rival
// is measured in the same run, in turn with ours, and the ratio is the figure
// to quote: machines differ and are noisy.

// samples are durations of one thing.
type samples []time.Duration

func (s samples) at(percent int) time.Duration {
	slices.Sort(s)
	return s[min(len(s)-1, len(s)*percent/100)]
}

// timed returns how long something took, or ends the benchmark.
func timed(b *testing.B, work func() error) time.Duration {
	b.Helper()
	began := time.Now()
	if err := work(); err != nil {
		b.Fatal(err)
	}
	return time.Since(began)
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// BenchmarkStart is start to ready, against `podman run -d` of the same image.
func BenchmarkStart(b *testing.B) {
	h := newCrashHost(b, podmanBackend(b))
	h.start()
	spec := h.backend.spec()
	spec.Readiness = nil // podman's command line has none either
	var ours, theirs samples
	for b.Loop() {
		ours = append(ours, timed(b, func() error {
			_, err := h.client().CreateSandbox(b.Context(), &agentv1.CreateSandboxRequest{
				Sandbox: &agentv1.Sandbox{Name: "bench", Spec: spec}, Start: true, RequestId: fmt.Sprint("start-", len(ours)),
			})
			return err
		}))
		_, err := h.client().DeleteSandbox(b.Context(), &agentv1.DeleteSandboxRequest{Name: "bench"})
		if err != nil {
			b.Fatal(err)
		}
		name := "rival-" + filepath.Base(h.dir)
		theirs = append(theirs, timed(b, func() error {
			return podman("run", "-d", "--name", name, "--cap-drop", "all", "--security-opt", "no-new-privileges", image.RootName, "sleep")
		}))
		if err := podman("rm", "-f", "-t", "0", name); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(milliseconds(ours.at(50)), "agent-ms")
	b.ReportMetric(milliseconds(theirs.at(50)), "podman-run-ms")
	b.ReportMetric(float64(ours.at(50))/float64(theirs.at(50)), "agent/podman")
}

func podman(args ...string) error {
	out, err := exec.Command("podman", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("podman %s: %w: %s", args[0], err, out)
	}
	return nil
}

// BenchmarkFiftyStartsAtOnce is fifty creations at once until all are ready,
// against fifty `podman run -d` at once.
func BenchmarkFiftyStartsAtOnce(b *testing.B) {
	h := newCrashHost(b, podmanBackend(b))
	h.start()
	spec := h.backend.spec()
	spec.Readiness = nil
	const n = 50
	atOnce := func(work func(name string) error) (failed int) {
		var all sync.WaitGroup
		var mu sync.Mutex
		for i := range n {
			all.Go(func() {
				if err := work(fmt.Sprintf("%s-%d", filepath.Base(h.dir), i)); err != nil {
					mu.Lock()
					failed++
					mu.Unlock()
					b.Log(err)
				}
			})
		}
		all.Wait()
		return failed
	}
	var ours, theirs time.Duration
	failed, rivalFailed := 0, 0
	for b.Loop() {
		ours += timed(b, func() error {
			failed += atOnce(func(name string) error {
				_, err := h.client().CreateSandbox(b.Context(), &agentv1.CreateSandboxRequest{
					Sandbox: &agentv1.Sandbox{Name: strings.ToLower(name), Spec: spec}, Start: true,
				})
				return err
			})
			return nil
		})
		atOnce(func(name string) error {
			_, err := h.client().DeleteSandbox(b.Context(), &agentv1.DeleteSandboxRequest{Name: strings.ToLower(name), AllowMissing: true})
			return err
		})
		theirs += timed(b, func() error {
			rivalFailed += atOnce(func(name string) error { return podman("run", "-d", "--name", name, image.RootName, "sleep") })
			return nil
		})
		atOnce(func(name string) error { return podman("rm", "-f", "-i", "-t", "0", name) })
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(ours.Seconds()/float64(b.N), "agent-s")
	b.ReportMetric(theirs.Seconds()/float64(b.N), "podman-run-s")
	b.ReportMetric(float64(ours)/float64(theirs), "agent/podman")
	b.ReportMetric(float64(failed), "agent-failures")
	b.ReportMetric(float64(rivalFailed), "podman-failures")
}

// BenchmarkEnsure is the call that a router makes on every request.
func BenchmarkEnsure(b *testing.B) {
	h := newCrashHost(b, processBackend())
	h.start()
	h.mutate("web", "create", true)
	request := &agentv1.EnsureSandboxRequest{Name: "web"}
	b.Run("latency", func(b *testing.B) {
		// The rival is a call that does nothing, of grpc's own health service:
		// what gRPC over a unix socket costs on this machine.
		health := healthpb.NewHealthClient(h.conn)
		var took, nothing samples
		for b.Loop() {
			took = append(took, timed(b, func() error {
				_, err := h.client().EnsureSandbox(b.Context(), request)
				return err
			}))
			nothing = append(nothing, timed(b, func() error {
				_, err := health.Check(b.Context(), &healthpb.HealthCheckRequest{})
				return err
			}))
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(float64(took.at(50).Nanoseconds())/1000, "p50-µs")
		b.ReportMetric(float64(took.at(99).Nanoseconds())/1000, "p99-µs")
		b.ReportMetric(float64(nothing.at(50).Nanoseconds())/1000, "bare-grpc-p50-µs")
		b.ReportMetric(float64(took.at(50))/float64(nothing.at(50)), "ensure/bare-grpc")
	})
	b.Run("throughput", func(b *testing.B) {
		b.SetParallelism(16)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if _, err := h.client().EnsureSandbox(b.Context(), request); err != nil {
					b.Error(err)
					return
				}
			}
		})
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
	})
}

// BenchmarkThousandSandboxes is an agent with 1,000 records, 100 of them
// running: List, Watch up to the sync marker, memory, and reconciling at start.
func BenchmarkThousandSandboxes(b *testing.B) {
	const records, running = 1000, 100
	h := newCrashHost(b, processBackend())
	h.start()
	empty := h.agentKiB(b)
	var all sync.WaitGroup
	turn := make(chan struct{}, 4*runtime.NumCPU())
	for i := range records {
		turn <- struct{}{}
		all.Go(func() {
			defer func() { <-turn }()
			h.mutate(fmt.Sprintf("box-%04d", i), "create", i < running)
		})
	}
	all.Wait()
	if b.Failed() {
		return
	}
	perSandbox := float64(h.agentKiB(b)-empty) / records
	b.Run("list", func(b *testing.B) {
		var took samples
		for b.Loop() {
			took = append(took, timed(b, func() error {
				r, err := h.client().ListSandboxes(b.Context(), &agentv1.ListSandboxesRequest{})
				if err == nil && len(r.GetSandboxes()) != records {
					err = fmt.Errorf("%d sandboxes", len(r.GetSandboxes()))
				}
				return err
			}))
		}
		b.ReportMetric(milliseconds(took.at(50)), "p50-ms")
	})
	b.Run("watch", func(b *testing.B) {
		var took samples
		for b.Loop() {
			took = append(took, timed(b, func() error { return h.watchToSync(b) }))
		}
		b.ReportMetric(milliseconds(took.at(50)), "p50-ms")
	})
	b.Run("memory", func(b *testing.B) {
		for b.Loop() {
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(float64(empty), "empty-KiB")
		b.ReportMetric(perSandbox, "KiB/sandbox")
	})
	b.Run("reconcile", func(b *testing.B) {
		var took samples
		for b.Loop() {
			took = append(took, timed(b, func() error {
				before := h.crashes.Load()
				h.kill()
				return h.awaitReconciled(b, before)
			}))
		}
		b.ReportMetric(milliseconds(took.at(50)), "p50-ms")
	})
}

func (h *crashHost) watchToSync(b *testing.B) error {
	stream, err := h.client().WatchSandboxes(b.Context(), &agentv1.WatchSandboxesRequest{})
	if err != nil {
		return err
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		if r.GetSync() != nil {
			return nil
		}
	}
}

// awaitReconciled returns once an agent after the one that was killed, the
// crashes before which are given, has compared every record with the host.
func (h *crashHost) awaitReconciled(b *testing.B, before int64) error {
	host := agentv1.NewHostServiceClient(h.conn)
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if h.crashes.Load() == before {
			continue
		}
		h.conn.ResetConnectBackoff()
		info, err := host.GetInfo(b.Context(), &agentv1.GetInfoRequest{})
		if err == nil && info.GetReconciled() {
			return nil
		}
	}
	return fmt.Errorf("not reconciled within a minute")
}

// agentKiB is the agent's resident memory, VmRSS of proc_pid_status(5).
func (h *crashHost) agentKiB(b *testing.B) int {
	b.Helper()
	h.mu.Lock()
	pid := h.cmd.Process.Pid
	h.mu.Unlock()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		b.Fatal(err)
	}
	return kib
}
