//go:build linux

package usage

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

// sampler takes one sample after the other into the same memory.
type sampler struct {
	stats guestv1.Stats

	proc   int // descriptors of the folders
	cgroup int // -1: none of the sandbox's own
	buffer []byte
	names  []byte

	processes []process // of this sample and the last, by pid
	before    []process
	order     []int
	turn      uint32
	top       [maxTop]guestv1.Process
}

const openFolder = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC

func (s *Service) open() (*sampler, error) {
	proc, err := unix.Open(s.proc, openFolder, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: s.proc, Err: err}
	}
	m := &sampler{proc: proc, cgroup: -1, buffer: make([]byte, 16<<10), names: make([]byte, 8<<10)}
	m.cgroup = m.openCgroup(s.cgroup)
	return m, nil
}

// openCgroup opens the folder of the sandbox's own cgroup, or gives -1. It is
// its own if a cgroup namespace has it as the root, and if it is not the root
// of the whole machine, which alone has no cgroup.type; see cgroups(7).
func (m *sampler) openCgroup(path string) int {
	membership, err := m.read(m.proc, "self/cgroup")
	if err != nil || string(bytes.TrimSpace(membership)) != "0::/" {
		return -1
	}
	folder, err := unix.Open(path, openFolder, 0)
	if err != nil {
		return -1
	}
	if err := unix.Faccessat(folder, "cgroup.type", unix.F_OK, 0); err != nil {
		_ = unix.Close(folder)
		return -1
	}
	return folder
}

func (m *sampler) close() {
	_ = unix.Close(m.proc)
	if m.cgroup >= 0 {
		_ = unix.Close(m.cgroup)
	}
}

// wholeSize: what the kernel gives of such a file at once is never less if there
// is more, in bytes; so a shorter one needs no second look for its end.
const wholeSize = 1 << 10

// read returns a file's content, or as much of it as the buffer holds, valid
// until the next call. It takes no *os.File: one for each process is too dear.
func (m *sampler) read(folder int, name string) ([]byte, error) {
	fd, err := retry(func() (int, error) { return unix.Openat(folder, name, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer unix.Close(fd)
	size := 0
	for size < len(m.buffer) {
		n, err := retry(func() (int, error) { return unix.Read(fd, m.buffer[size:]) })
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		size += n
		if n == 0 || size < wholeSize && m.buffer[size-1] == '\n' {
			break
		}
	}
	return m.buffer[:size], nil
}

func retry(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); err != unix.EINTR { //nolint:errorlint // System calls return it bare.
			return n, err
		}
	}
}

// sample fills stats. What the kernel does not tell stays zero; that there are
// no processes to be seen is an error.
func (m *sampler) sample() error {
	if err := m.walk(); err != nil {
		return err
	}
	stats := &m.stats
	stats.Time = timestamppb.New(time.Now())
	m.cpu()
	m.memory()
	m.disk()
	stats.Processes = uint32(min(len(m.processes), math.MaxInt32)) //nolint:gosec // Bounded.
	if network, err := m.read(m.proc, "net/dev"); err == nil {
		stats.NetworkReceiveBytes, stats.NetworkTransmitBytes = parseNetwork(network)
	}
	var root unix.Statfs_t
	if unix.Statfs("/", &root) == nil {
		unit := uint64(max(root.Frsize, 0)) //nolint:gosec // Not negative.
		stats.RootSizeBytes = root.Blocks * unit
		stats.RootUsedBytes = (root.Blocks - min(root.Bfree, root.Blocks)) * unit
	}
	if statm, err := m.read(m.proc, "self/statm"); err == nil {
		stats.GuestdMemoryBytes = parseResident(statm) * pageSize()
	}
	m.rank()
	return nil
}

func pageSize() uint64 { return uint64(os.Getpagesize()) } //nolint:gosec // Not negative.

// own reads a file of the sandbox's own cgroup.
func (m *sampler) own(name string) ([]byte, bool) {
	if m.cgroup < 0 {
		return nil, false
	}
	content, err := m.read(m.cgroup, name)
	return content, err == nil
}

// cpu tells the time used and the CPUs there are. Each process has the time of
// its ended children, and guestd that of all who lost their parents, so that
// the sum over those who live is complete but for children nobody waited for.
func (m *sampler) cpu() {
	used, known := uint64(0), false
	if stat, ok := m.own("cpu.stat"); ok {
		used, known = parseKeyed(stat, "usage_usec")
	}
	if !known {
		for i := range m.processes {
			used += (m.processes[i].ticks + m.processes[i].childTicks) * tickMicros
		}
	}
	m.stats.CpuUsec = max(m.stats.GetCpuUsec(), used) // a process may end between two looks
	var affinity unix.CPUSet
	cpus := runtime.NumCPU()
	if unix.SchedGetaffinity(0, &affinity) == nil {
		cpus = affinity.Count()
	}
	if limit, ok := m.own("cpu.max"); ok {
		cpus = min(cpus, parseQuota(limit))
	}
	m.stats.Cpus = uint32(cpus) //nolint:gosec // Small.
}

// memory tells the cgroup's without the page cache that the kernel would drop
// first, as podman stats and docker stats do; else the sum of what is resident
// of each process, in which shared pages count more than once.
func (m *sampler) memory() {
	used, known := uint64(0), false
	if current, ok := m.own("memory.current"); ok {
		used, known = parseNumber(current)
	}
	if !known {
		for i := range m.processes {
			used += m.processes[i].memory
		}
	} else if stat, ok := m.own("memory.stat"); ok {
		inactive, _ := parseKeyed(stat, "inactive_file")
		used -= min(inactive, used)
	}
	m.stats.MemoryBytes = used
	m.stats.MemoryLimitBytes = 0
	if limit, ok := m.own("memory.max"); ok {
		m.stats.MemoryLimitBytes, _ = parseNumber(limit) // "max" is none
	}
}

// disk tells the cgroup's, or the sum of what the kernel counts for each
// process that guestd may ask about, its ended children included. It asks about
// those that were busy, and about the others in turns.
func (m *sampler) disk() {
	var read, written uint64
	if stat, ok := m.own("io.stat"); ok {
		read, written = parseBlockIO(stat)
	} else {
		m.turn++
		for i := range m.processes {
			p := &m.processes[i]
			if p.since > 0 || !p.asked || (uint32(p.pid)+m.turn)%turns == 0 { //nolint:gosec // Not negative.
				m.ask(p)
			}
			read, written = read+p.read, written+p.written
		}
	}
	m.stats.DiskReadBytes = max(m.stats.GetDiskReadBytes(), read)
	m.stats.DiskWriteBytes = max(m.stats.GetDiskWriteBytes(), written)
}

func (m *sampler) ask(p *process) {
	p.asked = true
	if io, err := m.read(m.proc, p.path("io")); err == nil {
		p.read, _ = parseKeyed(io, "read_bytes:")
		p.written, _ = parseKeyed(io, "write_bytes:")
	}
}
