//go:build linux

package guestd

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// processes starts, signals and waits for guestd's children, and waits for
// orphans that become its own. A child is waited for under the same lock as it
// is started and signalled under, so that no number is ever used of a process
// that is gone.
type processes struct {
	// deathSignal is what children get when guestd dies; 0: the kernel sees
	// to them.
	deathSignal syscall.Signal
	// born is sent to after a start.
	born chan struct{}

	mu sync.Mutex
	// ended is called once, of a child that has ended, from reap.
	ended map[int]func(syscall.WaitStatus)
}

func newProcesses(first bool) *processes {
	p := &processes{born: make(chan struct{}, 1), ended: map[int]func(syscall.WaitStatus){}}
	if !first {
		p.deathSignal = unix.SIGKILL
	}
	return p
}

// start starts a child. ended is called once it has ended, perhaps before
// start returns; it must not block.
func (p *processes) start(path string, args []string, attr *syscall.ProcAttr, ended func(syscall.WaitStatus)) (int, error) {
	attr.Sys.Pdeathsig = p.deathSignal
	p.mu.Lock()
	pid, err := syscall.ForkExec(path, args, attr)
	if err == nil {
		p.ended[pid] = ended
	}
	p.mu.Unlock()
	if err != nil {
		return 0, err
	}
	select {
	case p.born <- struct{}{}:
	default:
	}
	return pid, nil
}

// reap waits for all children until ctx ends. It blocks a thread in the kernel
// because that learns of an exit sooner than by SIGCHLD.
func (p *processes) reap(ctx context.Context) {
	for ctx.Err() == nil {
		err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOWAIT, nil)
		switch {
		case err == nil:
			p.collect()
		case errors.Is(err, unix.ECHILD):
			p.awaitChild(ctx)
		}
	}
}

// awaitChild returns once there may be a child: one of ours, or an orphan of
// a process that entered the sandbox from outside.
func (p *processes) awaitChild(ctx context.Context) {
	orphans := make(chan os.Signal, 1)
	signal.Notify(orphans, unix.SIGCHLD)
	defer signal.Stop(orphans)
	if !p.none() {
		return // it came before the signal was listened for
	}
	select {
	case <-p.born:
	case <-orphans:
	case <-ctx.Done():
	}
}

// none reports whether there is no child at all.
func (p *processes) none() bool {
	err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOWAIT|unix.WNOHANG, nil)
	return errors.Is(err, unix.ECHILD)
}

func (p *processes) collect() {
	for {
		var status syscall.WaitStatus
		p.mu.Lock()
		pid, err := syscall.Wait4(-1, &status, unix.WNOHANG, nil)
		ended := p.ended[pid]
		delete(p.ended, pid)
		p.mu.Unlock()
		if err != nil || pid <= 0 {
			return
		}
		if ended != nil {
			ended(status)
		}
	}
}

// signal sends a signal to a child, or to the process group that it leads, and
// reports whether the child had not been waited for.
func (p *processes) signal(pid int, number syscall.Signal, group bool) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, alive := p.ended[pid]; !alive {
		return false, nil
	}
	if group {
		pid = -pid
	}
	return true, unix.Kill(pid, number)
}

// signalSession sends a signal to all processes of a session, and to the group
// of its leader if there is no /proc. It reports whether any is left.
func (p *processes) signalSession(leader int, number syscall.Signal) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	pids, err := processIDs()
	if err != nil {
		return unix.Kill(-leader, number) == nil
	}
	left := false
	for _, pid := range pids {
		// Asking the kernel costs a tenth of reading /proc, and few are of it.
		if session, err := unix.Getsid(pid); err != nil || session != leader {
			continue
		}
		if process, ok := readProcess(pid); !ok || process.zombie {
			continue
		}
		left = true
		_ = unix.Kill(pid, number)
	}
	return left
}

// killLimit bounds how long killAll looks for what is left.
const killLimit = 5 * time.Second

// killAll kills all that descends from guestd. Where guestd is process 1 the
// kernel does that as it exits.
func (p *processes) killAll() {
	self := os.Getpid()
	for begin := time.Now(); time.Since(begin) < killLimit && !p.none(); time.Sleep(time.Millisecond) {
		all, err := processTable()
		if err != nil {
			return
		}
		p.mu.Lock()
		for pid := range descendants(all, self) {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		p.mu.Unlock()
	}
}

// process is a line of the process table.
type process struct {
	pid, parent, session int
	zombie               bool
}

// descendants returns the processes below one.
func descendants(all []process, root int) map[int]bool {
	below := map[int]bool{}
	for grew := true; grew; {
		grew = false
		for _, process := range all {
			if (process.parent == root || below[process.parent]) && !below[process.pid] {
				below[process.pid] = true
				grew = true
			}
		}
	}
	return below
}

// processTable reads /proc.
func processTable() ([]process, error) {
	pids, err := processIDs()
	if err != nil {
		return nil, err
	}
	var all []process
	for _, pid := range pids {
		if process, ok := readProcess(pid); ok {
			all = append(all, process)
		}
	}
	return all, nil
}

// processIDs lists /proc. A sandbox may have none, or an empty one.
func processIDs() ([]int, error) {
	folder, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	names, err := folder.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	if len(pids) == 0 {
		return nil, errors.New("/proc is empty")
	}
	return pids, nil
}

// readProcess reads one line, unless the process is gone.
func readProcess(pid int) (process, bool) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return process{}, false
	}
	return parseStat(pid, string(text))
}

// parseStat reads a line of /proc/PID/stat; see proc_pid_stat(5). A program's
// name, in parentheses, may contain anything.
func parseStat(pid int, text string) (process, bool) {
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) < 4 {
		return process{}, false
	}
	parent, err1 := strconv.Atoi(fields[1])
	session, err2 := strconv.Atoi(fields[3])
	if err1 != nil || err2 != nil {
		return process{}, false
	}
	return process{pid: pid, parent: parent, session: session, zombie: fields[0] == "Z" || fields[0] == "X"}, true
}
