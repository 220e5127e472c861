//go:build linux

package usage

import (
	"context"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

func sampled(t testing.TB, s *Service) *sampler {
	t.Helper()
	m, err := s.open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.close)
	if err := m.sample(); err != nil {
		t.Fatal(err)
	}
	return m
}

// write makes files below a new folder.
func write(t testing.TB, files map[string]string) string {
	t.Helper()
	folder := t.TempDir()
	for name, content := range files {
		name = filepath.Join(folder, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return folder
}

const network = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 1290917    4783    0    0    0     0          0         0  1290917    4783    0    0    0     0       0          0
  eth0:     100       1    0    0    0     0          0         0       20       1    0    0    0     0       0          0
  tap0:1000 1 0 0 0 0 0 0 200 1 0 0 0 0 0 0
`

// ownProc is a /proc of two processes, guestd (1) and a workload (12).
func ownProc() map[string]string {
	return map[string]string{
		"self/cgroup": "0::/\n",
		"self/statm":  "500 7 3 1 0 90 0\n",
		"net/dev":     network,
		"1/stat":      "1 (guestd) S 0 1 1 0 -1 4194560 1 2 3 4 10 20 300 400 20 0 1 0 50 1000 7 18446744073709551615 1 1\n",
		"1/io":        "rchar: 9\nwchar: 9\nread_bytes: 4096\nwrite_bytes: 8192\ncancelled_write_bytes: 0\n",
		"12/stat":     "12 (a) b) (c) R 1 1 1 0 -1 4194560 1 2 3 4 1000 2000 0 0 20 0 1 0 60 1000 100 18446744073709551615 1 1\n",
		"12/io":       "read_bytes: 1\nwrite_bytes: 2\n",
		"version":     "no process",
	}
}

func ownCgroup() map[string]string {
	return map[string]string{
		"cgroup.type":    "domain\n",
		"cpu.stat":       "usage_usec 7654321\nuser_usec 1\nsystem_usec 2\n",
		"cpu.max":        "50000 100000\n",
		"memory.current": "1000000\n",
		"memory.stat":    "anon 1\ninactive_file 400000\nactive_file 5\n",
		"memory.max":     "2000000\n",
		"io.stat":        "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n8:16 rbytes=100 wbytes=200 rios=1 wios=2 dbytes=0 dios=0\n",
	}
}

func TestSampleReadsOwnCgroup(t *testing.T) {
	t.Parallel()
	stats := &sampled(t, &Service{write(t, ownProc()), write(t, ownCgroup())}).stats
	got := []uint64{
		stats.GetCpuUsec(), stats.GetMemoryBytes(), stats.GetMemoryLimitBytes(), stats.GetDiskReadBytes(), stats.GetDiskWriteBytes(),
		stats.GetNetworkReceiveBytes(), stats.GetNetworkTransmitBytes(), uint64(stats.GetProcesses()), uint64(stats.GetCpus()), stats.GetGuestdMemoryBytes(),
	}
	want := []uint64{7654321, 600000, 2000000, 110, 220, 1100, 220, 2, 1, 7 * pageSize()}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestSampleSumsProcessesWithoutCgroup(t *testing.T) {
	t.Parallel()
	foreign := ownProc()
	foreign["self/cgroup"] = "0::/user.slice/someone\n"
	old := ownProc()
	old["self/cgroup"] = "4:memory:/\n0::/\n"
	root := ownCgroup()
	delete(root, "cgroup.type")
	for name, s := range map[string]*Service{
		"not its own":     {write(t, foreign), write(t, ownCgroup())},
		"version 1":       {write(t, old), write(t, ownCgroup())},
		"the machine's":   {write(t, ownProc()), write(t, root)},
		"none":            {write(t, ownProc()), "/nowhere"},
		"no controllers":  {write(t, ownProc()), write(t, map[string]string{"cgroup.type": "domain\n"})},
		"nothing in them": {write(t, ownProc()), write(t, map[string]string{"cgroup.type": "", "cpu.stat": "", "memory.current": "", "cpu.max": "max 100000\n"})},
	} {
		stats := &sampled(t, s).stats
		got := []uint64{stats.GetCpuUsec(), stats.GetMemoryBytes(), stats.GetMemoryLimitBytes(), stats.GetDiskReadBytes(), stats.GetDiskWriteBytes()}
		want := []uint64{3730 * 10000, 107 * pageSize(), 0, 4097, 8194}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		if stats.GetCpus() == 0 {
			t.Errorf("%s: no CPUs", name)
		}
	}
}

func TestSampleRanksByWhatWasDoneSince(t *testing.T) {
	t.Parallel()
	files := ownProc()
	proc := write(t, files)
	m := sampled(t, &Service{proc, "/nowhere"})
	if top := m.stats.GetTop(); len(top) != 2 || top[0].GetPid() != 12 || top[0].GetCommand() != "a) b) (c" || top[0].GetCpuUsec() != 3000*10000 {
		t.Fatalf("top is %v", top)
	}
	// Only guestd did anything, then.
	stat := "1 (guestd) S 0 1 1 0 -1 4194560 1 2 3 4 11 20 300 400 20 0 1 0 50 1000 7 0\n"
	if err := os.WriteFile(filepath.Join(proc, "1/stat"), []byte(stat), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := m.sample(); err != nil {
		t.Fatal(err)
	}
	if top := m.stats.GetTop(); len(top) != 2 || top[0].GetPid() != 1 || top[0].GetCommand() != "guestd" {
		t.Fatalf("top is %v", top)
	}
	// The pid's next process is another, and what the last one used stays used.
	used := m.stats.GetCpuUsec()
	stat = "12 (\xff) S 0 1 1 0 -1 4194560 1 2 3 4 5 0 0 0 20 0 1 0 99 1000 7 0\n"
	if err := os.WriteFile(filepath.Join(proc, "12/stat"), []byte(stat), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := m.sample(); err != nil {
		t.Fatal(err)
	}
	if top := m.stats.GetTop(); top[0].GetPid() != 12 || top[0].GetCommand() != "?" || m.stats.GetCpuUsec() != used {
		t.Fatalf("top is %v, used %d of %d", top, m.stats.GetCpuUsec(), used)
	}
}

// TestSampleOfThisMachine compares with what the kernel says otherwise.
func TestSampleOfThisMachine(t *testing.T) {
	t.Parallel()
	child := exec.CommandContext(t.Context(), "sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = child.Process.Kill()
		_ = child.Wait()
	})
	m := sampled(t, New())
	var self, found bool
	for i := range m.processes {
		p := &m.processes[i]
		self = self || int(p.pid) == os.Getpid() && p.memory > 0
		found = found || int(p.pid) == child.Process.Pid
	}
	if !self || !found {
		t.Errorf("saw itself %v, its child %v, of %d processes", self, found, len(m.processes))
	}
	stats := &m.stats
	if stats.GetCpuUsec() == 0 || stats.GetMemoryBytes() < stats.GetGuestdMemoryBytes() || stats.GetGuestdMemoryBytes() == 0 ||
		stats.GetRootSizeBytes() < stats.GetRootUsedBytes() || stats.GetRootUsedBytes() == 0 || len(stats.GetTop()) == 0 || stats.GetCpus() == 0 {
		t.Errorf("%v", stats)
	}
}

func TestWatchStatsKeepsItsInterval(t *testing.T) {
	t.Parallel()
	s := &Service{write(t, ownProc()), "/nowhere"}
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		agent, guest := wire.New(near, wire.MaxFromGuest), wire.New(far, wire.MaxFrame)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.WatchStats(ctx, guest, &guestv1.WatchStats{IntervalMillis: 1}) }()
		var response guestv1.Response
		if err := agent.ReceiveMessage(&response); err != nil || response.GetFailure() != nil || response.GetProtocol() != wire.Protocol {
			t.Fatal(&response, err)
		}
		start := time.Now()
		for i := range 4 {
			var stats guestv1.Stats
			if err := agent.ReceiveMessage(&stats); err != nil {
				t.Fatal(err)
			}
			if want := time.Duration(i) * minInterval; time.Since(start) != want || stats.GetProcesses() != 2 || !stats.GetTime().AsTime().Equal(time.Now()) {
				t.Errorf("after %v, not %v: %v", time.Since(start), want, &stats)
			}
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		near.Close()
		far.Close()
	})
}

func TestWatchStatsEndsWhenNobodyReads(t *testing.T) {
	t.Parallel()
	near, far := net.Pipe()
	defer near.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- New().WatchStats(ctx, wire.New(far, wire.MaxFrame), &guestv1.WatchStats{}) }()
	var response guestv1.Response
	if err := wire.New(near, wire.MaxFromGuest).ReceiveMessage(&response); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(near, make([]byte, 1)); err != nil { // of the stats, which now block
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err == nil {
		t.Error("ended well")
	}
}

func TestSamplingTakesNoMemory(t *testing.T) {
	m := sampled(t, New())
	before := descriptors(t)
	few := testing.AllocsPerRun(20, func() {
		if err := m.sample(); err != nil {
			t.Error(err)
		}
	})
	if most := float64(8*len(m.processes) + 50); few > most {
		t.Errorf("%v allocations for %d processes", few, len(m.processes))
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestParseQuota(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int{
		"max 100000\n": math.MaxInt32, "200000 100000\n": 2, "150000 100000": 2, "1 100000": 1,
		"": math.MaxInt32, "1": math.MaxInt32, "0 0": math.MaxInt32, "1 99999999999999": math.MaxInt32,
	} {
		if got := parseQuota([]byte(text)); got != want {
			t.Errorf("%q: %d, not %d", text, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, files := range []map[string]string{ownProc(), ownCgroup()} {
		for _, content := range files {
			f.Add([]byte(content))
		}
	}
	names := make([]byte, 4096)
	if fd, err := unix.Open("/proc", openFolder, 0); err == nil {
		if n, err := unix.Getdents(fd, names); err == nil {
			f.Add(names[:n])
		}
		_ = unix.Close(fd)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var p process
		if p.parse(data); p.commSize > len(p.comm) {
			t.Errorf("name of %d bytes", p.commSize)
		}
		for pid := range pids(data) {
			if pid <= 0 {
				t.Errorf("pid %d", pid)
			}
		}
		parseNetwork(data)
		parseBlockIO(data)
		parseKeyed(data, "usage_usec")
		parseResident(data)
		if parseQuota(data) < 1 {
			t.Error("less than one CPU")
		}
		m := sampler{processes: []process{p}}
		m.rank()
		for _, told := range m.stats.GetTop() {
			if !utf8.ValidString(told.GetCommand()) {
				t.Errorf("command %q", told.GetCommand())
			}
		}
	})
}

// BenchmarkSample samples the processes of this machine and 100 more.
func BenchmarkSample(b *testing.B) {
	for range 100 {
		child := exec.CommandContext(b.Context(), "sleep", "600")
		if err := child.Start(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = child.Wait() })
		b.Cleanup(func() { _ = child.Process.Kill() })
	}
	m := sampled(b, New())
	b.ReportAllocs()
	for b.Loop() {
		if err := m.sample(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(len(m.processes)), "processes")
}
