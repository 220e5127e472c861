package main

import (
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// busyTop is a view after a few rounds of three sandboxes.
func busyTop() *topState {
	s := newTopState()
	for i := range 40 {
		at, n := timestamppb.New(noon.Add(time.Duration(i-40)*time.Second)), uint64(i)
		s.add(&agentv1.StreamStatsResponse{Samples: []*agentv1.StatsSample{
			{
				Name: "web", Generation: 1, Time: at, CpuMillis: new(uint32(50 * i)), Cpus: 2, MemoryBytes: 460 << 20, MemoryLimitBytes: 512 << 20, Processes: 12,
				NetworkReceiveBytes: n * 3 << 20, NetworkTransmitBytes: n << 10, DiskWriteBytes: n * 4096, RootUsedBytes: 3 << 30, RootSizeBytes: 20 << 30, GuestdMemoryBytes: 9 << 20,
				Top: []*agentv1.StatsProcess{{Pid: 1, Command: "guestd", CpuUsec: 5, MemoryBytes: 9 << 20}, {Pid: 42, Command: "node\x1b[31m", CpuUsec: n * 700_000, MemoryBytes: 400 << 20}},
			},
			{Name: "worker-with-a-long-name", Generation: 3, Time: at, CpuMillis: new(uint32(4)), Cpus: 1, MemoryBytes: 20 << 20, Processes: 2},
			{Name: "idle", Generation: 2, Time: at, CpuUsec: 1000 * n, Cpus: 4, MemoryBytes: 600 << 20, MemoryLimitBytes: 1 << 30, Processes: 1},
		}})
	}
	s.host = &agentv1.GetStatsResponse{MemoryTotalMib: 16 << 10, MemoryAvailableMib: 4 << 10, LoadAverage: []float64{0.5, 0.25, 0.1}}
	s.sandboxes = map[string]*agentv1.Sandbox{
		"web":  {Status: &agentv1.SandboxStatus{Phase: agentv1.Phase_PHASE_READY, StartTime: ago(200 * time.Second)}},
		"idle": {Status: &agentv1.SandboxStatus{Phase: agentv1.Phase_PHASE_READY, StartTime: ago(50 * time.Hour)}},
		"old":  {Status: &agentv1.SandboxStatus{Phase: agentv1.Phase_PHASE_STOPPED}},
	}
	return s
}

func TestTopFrames(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]struct {
		keys          []string
		width, height int
	}{
		"wide":   {nil, 140, 12},
		"narrow": {[]string{"m", "down"}, 60, 8},
		"inside": {[]string{"down", "enter", " "}, 100, 16},
		"tiny":   {nil, 12, 3},
	} {
		s := busyTop()
		for _, key := range change.keys {
			if s.press(key) {
				t.Fatalf("%q quits", key)
			}
		}
		lines := topFrame(s, terminal{}, change.width, change.height, noon)
		if len(lines) != change.height {
			t.Errorf("%s: %d lines, not %d", name, len(lines), change.height)
		}
		for _, line := range lines {
			if utf8.RuneCountInString(line) > change.width {
				t.Errorf("%s: %q is too wide", name, line)
			}
		}
		golden(t, "top-"+name+".golden", strings.Join(lines, "\n")+"\n")
	}
	if !busyTop().press("q") {
		t.Error("q does not quit")
	}
}

func TestTopNeverDrawsBeyondTheScreen(t *testing.T) {
	t.Parallel()
	for width := 1; width < 160; width += 3 {
		for height := 1; height < 20; height++ {
			for _, inside := range []bool{false, true} {
				state := busyTop()
				if inside {
					state.press("enter")
				}
				lines := topFrame(state, terminal{}, width, height, noon)
				if len(lines) != height {
					t.Fatalf("%d by %d: %d lines", width, height, len(lines))
				}
				for _, line := range lines {
					if utf8.RuneCountInString(line) > width || strings.ContainsAny(line, "\n\x1b") {
						t.Fatalf("%d by %d: %q", width, height, line)
					}
				}
			}
		}
	}
}

func TestTopSorts(t *testing.T) {
	t.Parallel()
	for key, want := range map[string]string{
		"c": "[web worker-with-a-long-name idle]", "m": "[idle web worker-with-a-long-name]", "n": "[web idle worker-with-a-long-name]",
		"p": "[web worker-with-a-long-name idle]", "a": "[idle web worker-with-a-long-name]",
	} {
		state := busyTop()
		state.press(key)
		var names []string
		for _, r := range state.order() {
			names = append(names, r.name)
		}
		if got := fmt.Sprint(names); got != want {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
}

func TestTopForgetsAnEarlierLife(t *testing.T) {
	t.Parallel()
	state := busyTop()
	state.selected, state.inside = "web", true
	state.add(&agentv1.StreamStatsResponse{Samples: []*agentv1.StatsSample{{Name: "idle", Generation: 3, Time: timestamppb.New(noon), CpuUsec: 1}}})
	if r := state.rows["idle"]; r.cpuMillis >= 0 || r.netIn >= 0 || len(r.history) > 0 {
		t.Errorf("a new life has the rates of the one before: %+v", r)
	}
	if state.inside || state.selected != "" {
		t.Error("a sandbox that is gone is still selected")
	}
}

func TestParseKey(t *testing.T) {
	t.Parallel()
	typed := []byte("q\x1b[A\x1bOB\x1b[1;5Cx\r\x1b[99~\x1b")
	var keys []string
	for key, rest := parseKey(typed); key != ""; key, rest = parseKey(rest) {
		keys = append(keys, key)
	}
	if got := strings.Join(keys, ","); got != "q,up,down,right,x,enter,?,esc" {
		t.Error(got)
	}
}

func TestBars(t *testing.T) {
	t.Parallel()
	for share, want := range map[float64]string{-1: "····", 0: "····", 0.5: "██··", 0.53: "██▏·", 1: "████", 7: "████"} {
		if got := bar(share, 4); got != want {
			t.Errorf("bar(%v) = %q, want %q", share, got, want)
		}
	}
	if got := sparkline([]float64{0, 500, 999, 5000}, 6, 1000); got != "  ▁▅██" {
		t.Errorf("%q", got)
	}
}
