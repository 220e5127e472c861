//go:build linux

package usage

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	maxTop = 16
	// maxProcesses is how many processes are counted.
	maxProcesses = 16 << 10
	// turns is in how many samples each process is asked about what it read and
	// wrote, at least once.
	turns = 8
	// tickMicros is a tick of /proc: Linux shows programs 100 a second,
	// whatever it counts with (USER_HZ in time(7)).
	tickMicros = 1e6 / 100
	maxComm    = 64
)

// process is one process in one sample.
type process struct {
	pid        int32
	ticks      uint64 // its own, and childTicks those of its ended children
	childTicks uint64
	since      uint64 // ticks since the last sample
	start      uint64 // tells it from another of that pid
	memory     uint64 // resident, bytes
	asked      bool   // what it read and wrote on disks, in bytes
	read       uint64
	written    uint64
	comm       [maxComm]byte
	commSize   int
}

func (p *process) path(file string) string {
	return strconv.Itoa(int(p.pid)) + "/" + file
}

// walk reads all processes.
func (m *sampler) walk() error {
	m.processes, m.before = m.before[:0], m.processes
	if _, err := unix.Seek(m.proc, 0, 0); err != nil {
		return err
	}
	for len(m.processes) < maxProcesses {
		n, err := retry(func() (int, error) { return unix.Getdents(m.proc, m.names) })
		if err != nil {
			return fmt.Errorf("list of processes: %w", err)
		}
		if n == 0 {
			break
		}
		for pid := range pids(m.names[:n]) {
			m.add(pid)
		}
	}
	slices.SortFunc(m.processes, func(a, b process) int { return cmp.Compare(a.pid, b.pid) })
	m.compare()
	return nil
}

// add reads one process, if it is still there.
func (m *sampler) add(pid int32) {
	p := process{pid: pid}
	stat, err := m.read(m.proc, p.path("stat"))
	if err == nil && p.parse(stat) && len(m.processes) < maxProcesses {
		m.processes = append(m.processes, p)
	}
}

// pids yields the names that are numbers among directory entries as getdents64(2)
// gives them.
func pids(entries []byte) func(yield func(int32) bool) {
	const placeSize, placeName = 16, 19 // of struct linux_dirent64
	return func(yield func(int32) bool) {
		for len(entries) > placeName {
			size := int(binary.NativeEndian.Uint16(entries[placeSize:]))
			if size <= placeName || size > len(entries) {
				return
			}
			if pid, ok := parsePID(entries[placeName:size]); ok && !yield(pid) {
				return
			}
			entries = entries[size:]
		}
	}
}

// compare finds what each process did since the last sample: all, if it was
// not there.
func (m *sampler) compare() {
	rest := m.before
	for i := range m.processes {
		p := &m.processes[i]
		p.since = p.ticks
		for len(rest) > 0 && rest[0].pid < p.pid {
			rest = rest[1:]
		}
		if len(rest) > 0 && rest[0].pid == p.pid && rest[0].start == p.start {
			p.since -= min(rest[0].ticks, p.ticks)
			p.asked, p.read, p.written = rest[0].asked, rest[0].read, rest[0].written
		}
	}
}

// rank tells the busiest since the last sample; among the idle, the largest.
func (m *sampler) rank() {
	m.order = m.order[:0]
	for i := range m.processes {
		m.order = append(m.order, i)
	}
	slices.SortFunc(m.order, func(i, j int) int {
		a, b := &m.processes[i], &m.processes[j]
		return cmp.Or(cmp.Compare(b.since, a.since), cmp.Compare(b.memory, a.memory), cmp.Compare(a.pid, b.pid))
	})
	m.stats.Top = m.stats.Top[:0]
	for place, i := range m.order[:min(len(m.order), maxTop)] {
		p, told := &m.processes[i], &m.top[place]
		told.Pid, told.CpuUsec, told.MemoryBytes = p.pid, p.ticks*tickMicros, p.memory
		if comm := p.comm[:p.commSize]; told.Command != string(comm) {
			told.Command = strings.ToValidUTF8(string(comm), "?")
		}
		m.stats.Top = append(m.stats.Top, told)
	}
}
