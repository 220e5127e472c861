package main

import (
	"cmp"
	"slices"
	"strings"
	"time"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// historyLength is how many rounds a sandbox's history of CPU goes back.
const historyLength = 32

// topRow is what is known of one sandbox: its last sample, and the rates since
// the one before. A rate is negative while it is not known.
type topRow struct {
	name      string
	last      *agentv1.StatsSample
	cpuMillis float64
	netIn     float64 // bytes a second
	netOut    float64
	diskRead  float64
	diskWrite float64
	history   []float64           // of cpuMillis, the latest last
	processes map[int32]processOf // by pid
}

// processOf is what a process uses; cpuMillis is negative while it is not known.
type processOf struct {
	sample    *agentv1.StatsProcess
	cpuMillis float64
}

// topSort is what rows are ordered by.
type topSort byte

// The orders, named by their keys.
const (
	byCPU       topSort = 'c'
	byMemory    topSort = 'm'
	byNetwork   topSort = 'n'
	byDisk      topSort = 'd'
	byProcesses topSort = 'p'
	byName      topSort = 'a'
)

// topState is what the view shows, and how. Nothing in it moves by itself.
type topState struct {
	rows     map[string]*topRow
	sort     topSort
	selected string // a sandbox's name
	inside   bool   // the processes of the selected one are shown
	paused   bool
	sampled  time.Time // the latest sample's time

	host      *agentv1.GetStatsResponse   // nil: not known yet
	sandboxes map[string]*agentv1.Sandbox // nil: not known yet
	problem   string                      // shown in the last line
}

func newTopState() *topState { return &topState{rows: map[string]*topRow{}, sort: byCPU} }

// add takes in a round: a sandbox that is not in it does not run any more.
func (s *topState) add(round *agentv1.StreamStatsResponse) {
	next := map[string]*topRow{}
	for _, sample := range round.GetSamples() {
		row := s.rows[sample.GetName()]
		if row == nil || row.last.GetGeneration() != sample.GetGeneration() {
			row = &topRow{name: sample.GetName()}
		}
		row.add(sample)
		next[row.name] = row
		if at := sample.GetTime().AsTime(); at.After(s.sampled) {
			s.sampled = at
		}
	}
	s.rows = next
	if s.rows[s.selected] == nil {
		s.selected, s.inside = "", false
	}
}

func (r *topRow) add(sample *agentv1.StatsSample) {
	before := r.last
	r.last = sample
	elapsed := sample.GetTime().AsTime().Sub(before.GetTime().AsTime()).Seconds()
	known := before != nil && elapsed > 0
	rate := func(of func(*agentv1.StatsSample) uint64) float64 {
		if !known || of(sample) < of(before) {
			return -1
		}
		return float64(of(sample)-of(before)) / elapsed
	}
	r.netIn, r.netOut = rate((*agentv1.StatsSample).GetNetworkReceiveBytes), rate((*agentv1.StatsSample).GetNetworkTransmitBytes)
	r.diskRead, r.diskWrite = rate((*agentv1.StatsSample).GetDiskReadBytes), rate((*agentv1.StatsSample).GetDiskWriteBytes)
	if r.cpuMillis = float64(sample.GetCpuMillis()); sample.CpuMillis == nil {
		r.cpuMillis = rate((*agentv1.StatsSample).GetCpuUsec)
		if r.cpuMillis >= 0 {
			r.cpuMillis /= 1000
		}
	}
	if r.cpuMillis >= 0 {
		r.history = append(r.history, r.cpuMillis)
		r.history = r.history[max(0, len(r.history)-historyLength):]
	}
	processes := map[int32]processOf{}
	for _, p := range sample.GetTop() {
		used := processOf{p, -1}
		if old, ok := r.processes[p.GetPid()]; ok && known && old.sample.GetCommand() == p.GetCommand() && p.GetCpuUsec() >= old.sample.GetCpuUsec() {
			used.cpuMillis = float64(p.GetCpuUsec()-old.sample.GetCpuUsec()) / elapsed / 1000
		}
		processes[p.GetPid()] = used
	}
	r.processes = processes
}

// order returns the rows as they are sorted: the busiest first, those alike by
// name.
func (s *topState) order() []*topRow {
	rows := make([]*topRow, 0, len(s.rows))
	for _, r := range s.rows {
		rows = append(rows, r)
	}
	weight := func(r *topRow) float64 {
		switch s.sort {
		case byMemory:
			return float64(r.last.GetMemoryBytes())
		case byNetwork:
			return r.netIn + r.netOut
		case byDisk:
			return r.diskRead + r.diskWrite
		case byProcesses:
			return float64(r.last.GetProcesses())
		case byName:
			return 0
		}
		return r.cpuMillis
	}
	slices.SortFunc(rows, func(a, b *topRow) int {
		return cmp.Or(cmp.Compare(weight(b), weight(a)), strings.Compare(a.name, b.name))
	})
	return rows
}

// inOrder returns a sandbox's processes, the busiest first.
func (r *topRow) inOrder(sort topSort) []processOf {
	list := make([]processOf, 0, len(r.processes))
	for _, p := range r.processes {
		list = append(list, p)
	}
	slices.SortFunc(list, func(a, b processOf) int {
		byUse := cmp.Compare(b.cpuMillis, a.cpuMillis)
		if sort == byMemory {
			byUse = cmp.Compare(b.sample.GetMemoryBytes(), a.sample.GetMemoryBytes())
		}
		return cmp.Or(byUse, cmp.Compare(b.sample.GetCpuUsec(), a.sample.GetCpuUsec()), cmp.Compare(a.sample.GetPid(), b.sample.GetPid()))
	})
	return list
}

// press does what a key stands for. quit is set for those that end the view.
func (s *topState) press(key string) (quit bool) {
	switch key {
	case "q", "\x03": // Ctrl-C
		return true
	case "c", "m", "n", "d", "p", "a":
		s.sort = topSort(key[0])
	case "up", "k":
		s.move(-1)
	case "down", "j":
		s.move(1)
	case "enter", "right", "l":
		if rows := s.order(); s.selected == "" && len(rows) > 0 {
			s.selected = rows[0].name
		}
		s.inside = s.selected != ""
	case "esc", "left", "h":
		if !s.inside {
			s.selected = ""
		}
		s.inside = false
	case " ":
		s.paused = !s.paused
	}
	return false
}

// move moves the selection.
func (s *topState) move(by int) {
	rows := s.order()
	if len(rows) == 0 {
		return
	}
	at := slices.IndexFunc(rows, func(r *topRow) bool { return r.name == s.selected })
	if at < 0 && by < 0 {
		at = len(rows)
	}
	s.selected = rows[min(max(at+by, 0), len(rows)-1)].name
}

// parseKey takes the first key off what was typed: its character, or its name.
// Of an unknown sequence it takes the whole; see ECMA-48 section 5.4.
func parseKey(typed []byte) (key string, rest []byte) {
	if len(typed) == 0 {
		return "", nil
	}
	if typed[0] != 0x1b {
		switch typed[0] {
		case '\r', '\n':
			return "enter", typed[1:]
		}
		return string(typed[:1]), typed[1:]
	}
	if len(typed) == 1 {
		return "esc", nil
	}
	if typed[1] != '[' && typed[1] != 'O' {
		return "esc", typed[1:]
	}
	for i, b := range typed[2:] {
		if b < 0x40 || b > 0x7e {
			continue
		}
		name := map[byte]string{'A': "up", 'B': "down", 'C': "right", 'D': "left"}[b]
		return orElse(name, "?"), typed[i+3:]
	}
	return "?", nil
}
