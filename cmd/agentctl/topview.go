package main

import (
	"fmt"
	"math"
	"strings"
	"time"
	"unicode/utf8"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// topFrame returns the view as lines that fill a screen of width by height
// exactly; t says whether in colour. It is a pure function of what it is given.
func topFrame(s *topState, t terminal, width, height int, now time.Time) []string {
	v := &topView{s: s, t: t, width: width, now: now}
	lines := v.header()
	body := v.list
	if s.inside {
		body = v.inside
	}
	lines = append(lines, body(max(0, height-len(lines)-1))...)
	for len(lines) < height-1 {
		lines = append(lines, "")
	}
	lines = append(lines[:max(0, height-1)], v.footer())
	return lines[max(0, len(lines)-height):]
}

// topView draws one frame.
type topView struct {
	s     *topState
	t     terminal
	width int
	now   time.Time
}

// column is one of the table: how wide it is at least, and from which width of
// the terminal it is shown.
type column struct {
	head  string
	width int
	right bool
	from  int
	sort  topSort // the head is bold when rows are sorted by it
	cell  func(r *topRow) string
}

// span is text with its colour, the width of which is known.
type span struct {
	text  string
	paint func(string) string
}

// fit joins spans to a line that is no wider than the screen.
func (v *topView) fit(spans ...span) string {
	var b strings.Builder
	room := v.width
	for _, s := range spans {
		text := s.text
		if n := utf8.RuneCountInString(text); n > room {
			text = string([]rune(text)[:max(room, 0)])
		}
		room -= utf8.RuneCountInString(text)
		if s.paint != nil && text != "" {
			text = s.paint(text)
		}
		b.WriteString(text)
	}
	return b.String()
}

func (v *topView) header() []string {
	counts := map[string]int{}
	for _, sb := range v.s.sandboxes {
		counts[phaseName(sb.GetStatus().GetPhase())]++
	}
	var cpu float64
	var memory, guestds uint64
	for _, r := range v.s.rows {
		cpu += max(0, r.cpuMillis)
		memory += r.last.GetMemoryBytes()
		guestds += r.last.GetGuestdMemoryBytes()
	}
	first := []span{{"agentctl top", v.t.bold}, {"  " + plural(len(v.s.rows), "sandbox", "sandboxes") + " running", nil}}
	if others := len(v.s.sandboxes) - counts["ready"]; v.s.sandboxes != nil && others > 0 {
		var parts []string
		for _, phase := range []string{"creating", "starting", "stopping", "backoff", "failed", "stopped", "hibernated", "deleting", "unknown"} {
			if n := counts[phase]; n > 0 {
				parts = append(parts, fmt.Sprintf("%d %s", n, phase))
			}
		}
		first = append(first, span{", " + strings.Join(parts, ", "), v.t.dim})
	}
	second := []span{{"CPU ", v.t.dim}, {percentText(cpu), nil}, {"  MEM ", v.t.dim}, {size(memory), nil}, {"  guestd ", v.t.dim}, {size(guestds), nil}}
	if host := v.s.host; host != nil {
		total, free := host.GetMemoryTotalMib(), host.GetMemoryAvailableMib()
		used := float64(total-min(free, total)) / float64(max(total, 1))
		second = append(second, span{"  HOST ", v.t.dim}, span{bar(used, 10), v.heat(used)},
			span{fmt.Sprintf(" %s of %s", size((total-min(free, total))<<20), size(total<<20)), nil})
		if load := host.GetLoadAverage(); len(load) == 3 {
			second = append(second, span{"  LOAD ", v.t.dim}, span{fmt.Sprintf("%.2f %.2f %.2f", load[0], load[1], load[2]), nil})
		}
	}
	return []string{v.fit(first...), v.fit(second...), ""}
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// columns are those that the screen has room for.
func (v *topView) columns() []column {
	all := []column{
		{"NAME", v.nameWidth(), false, 0, byName, func(r *topRow) string { return r.name }},
		{"CPU", 6, true, 0, byCPU, func(r *topRow) string { return percentText(r.cpuMillis) }},
		{"", 16, false, 84, 0, func(r *topRow) string { return sparkline(r.history, 16, cpuScale(r)) }},
		{"MEM", 8, true, 0, byMemory, func(r *topRow) string { return size(r.last.GetMemoryBytes()) }},
		{"", 8, false, 100, 0, func(r *topRow) string {
			if limit := r.last.GetMemoryLimitBytes(); limit > 0 {
				return bar(float64(r.last.GetMemoryBytes())/float64(limit), 8)
			}
			return ""
		}},
		{"LIMIT", 8, false, 100, 0, func(r *topRow) string { return limitText(r.last.GetMemoryLimitBytes()) }},
		{"NET ↓", 9, true, 60, byNetwork, func(r *topRow) string { return rateText(r.netIn) }},
		{"NET ↑", 9, true, 60, byNetwork, func(r *topRow) string { return rateText(r.netOut) }},
		{"DISK", 9, true, 110, byDisk, func(r *topRow) string { return rateText(sumRates(r.diskRead, r.diskWrite)) }},
		{"PROCS", 5, true, 64, byProcesses, func(r *topRow) string { return fmt.Sprint(r.last.GetProcesses()) }},
		{"PHASE", 12, false, 72, 0, func(r *topRow) string { return v.phase(r.name) }},
	}
	var shown []column
	for _, c := range all {
		if v.width >= c.from {
			shown = append(shown, c)
		}
	}
	return shown
}

func (v *topView) nameWidth() int {
	width := 4
	for name := range v.s.rows {
		width = max(width, len(name))
	}
	return min(width, max(12, v.width/5))
}

// phase is a sandbox's phase with how long it has been up.
func (v *topView) phase(name string) string {
	sb := v.s.sandboxes[name]
	if sb == nil {
		return ""
	}
	return strings.TrimSpace(phaseName(sb.GetStatus().GetPhase()) + " " + uptime(sb, v.now))
}

// list is one line for each sandbox.
func (v *topView) list(room int) []string {
	columns, rows := v.columns(), v.s.order()
	var heads []span
	for i, c := range columns {
		paint := v.t.dim
		if c.sort == v.s.sort && c.sort != 0 {
			paint = v.t.bold
		}
		heads = append(heads, span{pad(c.head, c.width, c.right, i == len(columns)-1), paint})
	}
	lines := []string{v.fit(v.marked(false, heads)...)}
	if len(rows) == 0 {
		return append(lines, v.fit(span{"  no sandbox runs; agentctl sandbox start makes one", v.t.dim}))
	}
	for _, r := range v.visible(rows, room-1) {
		var cells []span
		for i, c := range columns {
			cells = append(cells, span{pad(c.cell(r), c.width, c.right, i == len(columns)-1), v.paint(c, r)})
		}
		lines = append(lines, v.fit(v.marked(r.name == v.s.selected, cells)...))
	}
	return lines
}

// visible are the rows that there is room for: those around the selected one.
func (v *topView) visible(rows []*topRow, room int) []*topRow {
	room = max(room, 0)
	if len(rows) <= room {
		return rows
	}
	first := 0
	for i, r := range rows {
		if r.name == v.s.selected {
			first = min(max(0, i-room/2), len(rows)-room)
		}
	}
	return rows[first : first+room]
}

// marked begins a line with the mark of the selected row, and separates cells.
func (v *topView) marked(selected bool, cells []span) []span {
	mark := span{"  ", nil}
	if selected {
		mark = span{"▸ ", v.t.bold}
	}
	line := []span{mark}
	for i, c := range cells {
		if i > 0 {
			line = append(line, span{"  ", nil})
		}
		line = append(line, c)
	}
	return line
}

// paint is the colour of a cell: that of what is scarce.
func (v *topView) paint(c column, r *topRow) func(string) string {
	switch {
	case c.sort == byName && r.name == v.s.selected:
		return v.t.bold
	case c.sort == byCPU || c.from == 84:
		return v.heat(r.cpuMillis / cpuScale(r))
	case c.sort == byMemory || c.from == 100 && c.head == "":
		if limit := r.last.GetMemoryLimitBytes(); limit > 0 {
			return v.heat(float64(r.last.GetMemoryBytes()) / float64(limit))
		}
	case c.head == "PHASE":
		return phasePaint(v.t, v.s.sandboxes[r.name].GetStatus().GetPhase())
	}
	return nil
}

// heat is the colour of a share: green, yellow from 60 %, red from 85 %.
func (v *topView) heat(share float64) func(string) string {
	switch {
	case share >= 0.85:
		return v.t.red
	case share >= 0.6:
		return v.t.yellow
	}
	return v.t.green
}

// inside is one sandbox with its busiest processes.
func (v *topView) inside(room int) []string {
	r := v.s.rows[v.s.selected]
	s := r.last
	lines := []string{
		v.fit(span{r.name, v.t.bold}, span{"  " + v.phase(r.name), v.t.dim}),
		v.fit(span{"CPU   ", v.t.dim}, span{fmt.Sprintf("%7s ", percentText(r.cpuMillis)), nil},
			span{sparkline(r.history, historyLength, cpuScale(r)), v.heat(r.cpuMillis / cpuScale(r))},
			span{fmt.Sprintf("  of %s", plural(int(max(s.GetCpus(), 1)), "CPU", "CPUs")), v.t.dim}),
		v.fit(span{"MEM   ", v.t.dim}, span{fmt.Sprintf("%7s ", size(s.GetMemoryBytes())), nil}, v.memoryBar(s)),
		v.fit(span{"NET   ", v.t.dim}, span{fmt.Sprintf("↓ %s  ↑ %s", rateText(r.netIn), rateText(r.netOut)), nil},
			span{fmt.Sprintf("   in all ↓ %s  ↑ %s", size(s.GetNetworkReceiveBytes()), size(s.GetNetworkTransmitBytes())), v.t.dim}),
		v.fit(span{"DISK  ", v.t.dim}, span{fmt.Sprintf("read %s  write %s", rateText(r.diskRead), rateText(r.diskWrite)), nil},
			span{fmt.Sprintf("   / has %s of %s", size(s.GetRootUsedBytes()), size(s.GetRootSizeBytes())), v.t.dim}),
		"",
		v.fit(span{"     PID    CPU       MEM  COMMAND", v.t.dim}),
	}
	for _, p := range r.inOrder(v.s.sort) {
		lines = append(lines, v.fit(span{fmt.Sprintf("%8d %6s  %8s  ", p.sample.GetPid(), percentText(p.cpuMillis), size(p.sample.GetMemoryBytes())), nil},
			span{oneLine(p.sample.GetCommand()), v.t.bold}))
	}
	if more := int(s.GetProcesses()) - len(s.GetTop()); more > 0 {
		lines = append(lines, v.fit(span{fmt.Sprintf("         and %d more", more), v.t.dim}))
	}
	return lines[:min(len(lines), room)]
}

func (v *topView) memoryBar(s *agentv1.StatsSample) span {
	limit := s.GetMemoryLimitBytes()
	if limit == 0 {
		return span{" no limit", v.t.dim}
	}
	share := float64(s.GetMemoryBytes()) / float64(limit)
	return span{bar(share, historyLength) + "  of " + size(limit), v.heat(share)}
}

func (v *topView) footer() string {
	if v.s.problem != "" {
		return v.fit(span{oneLine(v.s.problem), v.t.red})
	}
	keys := "q quit  c cpu  m memory  n network  d disk  p processes  a name  ↑↓ select  enter inside  space pause"
	if v.s.inside {
		keys = "q quit  esc back  ↑↓ other sandbox  c cpu  m memory  space pause"
	}
	if v.s.paused {
		return v.fit(span{"paused  ", v.t.yellow}, span{keys, v.t.dim})
	}
	return v.fit(span{keys, v.t.dim})
}

// pad fills text up to a width, or shortens it; the last column needs no fill.
func pad(s string, width int, right, last bool) string {
	s = clipText(s, width)
	fill := strings.Repeat(" ", width-utf8.RuneCountInString(s))
	switch {
	case right:
		return fill + s
	case last:
		return s
	}
	return s + fill
}

// cpuScale is what a full bar stands for: the CPUs that a sandbox may use.
func cpuScale(r *topRow) float64 { return 1000 * float64(max(r.last.GetCpus(), 1)) }

// percentText prints thousandths of a CPU in percent of one; - if not known.
func percentText(millis float64) string {
	switch {
	case millis < 0:
		return "-"
	case millis < 1000:
		return fmt.Sprintf("%.1f%%", millis/10)
	}
	return fmt.Sprintf("%.0f%%", millis/10)
}

// rateText prints bytes a second; - if not known.
func rateText(rate float64) string {
	if rate < 0 {
		return "-"
	}
	return size(uint64(math.Round(rate))) + "/s"
}

func limitText(bytes uint64) string {
	if bytes == 0 {
		return "-"
	}
	return size(bytes)
}

func sumRates(a, b float64) float64 {
	if a < 0 || b < 0 {
		return -1
	}
	return a + b
}

// bar is a share from 0 to 1, drawn in eighths of a character.
func bar(share float64, width int) string {
	eighths := int(math.Round(min(max(share, 0), 1) * float64(8*width)))
	parts := []rune(" ▏▎▍▌▋▊▉")
	text := strings.Repeat("█", eighths/8)
	if eighths%8 > 0 {
		text += string(parts[eighths%8])
	}
	return text + strings.Repeat("·", width-utf8.RuneCountInString(text))
}

// sparkline draws the last values, each as its share of most. One that is not
// nothing is seen.
func sparkline(values []float64, width int, most float64) string {
	levels := []rune("▁▂▃▄▅▆▇█")
	values = values[max(0, len(values)-width):]
	var b strings.Builder
	b.WriteString(strings.Repeat(" ", width-len(values)))
	for _, v := range values {
		b.WriteRune(levels[min(max(int(v/most*8), 0), len(levels)-1)])
	}
	return b.String()
}
