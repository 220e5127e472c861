package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// confined makes a process group that does not outlive the calling thread.
func confined() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
}

// socketPath is a path for a socket in an open folder, given by its descriptor
// in whoever uses the path, that is short enough for unix(7), however long the
// folder's own is.
func socketPath(dir int, name string) string {
	return "/proc/self/fd/" + strconv.Itoa(dir) + "/" + name
}

// becomeReaper makes this process the parent of all that descend from it and
// lose theirs.
func becomeReaper() error {
	const prSetChildSubreaper = 36 // prctl(2)
	if _, _, err := syscall.RawSyscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0); err != 0 {
		return os.NewSyscallError("prctl", err)
	}
	return nil
}

// reapLimit is how long what was killed may take to end.
const reapLimit = 10 * time.Second

// killDescendants kills and reaps all that descends from this process. It has
// to be a reaper, and to wait for children nowhere else meanwhile.
func killDescendants() error {
	for deadline := time.Now().Add(reapLimit); ; time.Sleep(200 * time.Microsecond) {
		for {
			pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
			if errors.Is(err, syscall.ECHILD) {
				return nil
			}
			if err != nil && !errors.Is(err, syscall.EINTR) {
				return os.NewSyscallError("wait4", err)
			}
			if pid == 0 {
				break
			}
		}
		if time.Now().After(deadline) {
			return errors.New("processes of the sandbox do not end")
		}
		// Whoever has no parent any more becomes a child of this process, so
		// that in the end nobody is missed who was forked meanwhile.
		for _, pid := range descendants(os.Getpid()) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// descendants returns the processes below one; see proc_pid_children(5).
func descendants(pid int) []int {
	var found []int
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, file := range files {
		list, _ := os.ReadFile(file) // of a thread that may be gone
		for field := range strings.FieldsSeq(string(list)) {
			if child, err := strconv.Atoi(field); err == nil {
				found = append(append(found, child), descendants(child)...)
			}
		}
	}
	return found
}

// halt stops all that descends from this process, and returns whom it has
// stopped. It returns once nobody runs: what was sent SIGSTOP and still does
// may be forking.
func halt(int) (halted []int, err error) {
	told := map[int]bool{}
	// A process may have forked between the look at its children and its stop,
	// so nobody may run twice in a row.
	for deadline, quiet := time.Now().Add(reapLimit), 0; quiet < 2; {
		running := 0
		for _, pid := range descendants(os.Getpid()) {
			state := stateOf(pid)
			// One that waits for a child of vfork(2) stops right after that.
			if strings.ContainsRune("TtZX", state) || state == 'D' && told[pid] {
				continue
			}
			running++
			told[pid] = true
			_ = syscall.Kill(pid, syscall.SIGSTOP)
		}
		if quiet++; running > 0 {
			quiet = 0
			time.Sleep(200 * time.Microsecond)
		}
		if time.Now().After(deadline) {
			err = errors.New("processes of the sandbox do not stop")
			break
		}
	}
	for pid := range told {
		halted = append(halted, pid)
	}
	return halted, err
}

// carryOn lets those go on whom halt has stopped.
func carryOn(halted []int) {
	for _, pid := range halted {
		_ = syscall.Kill(pid, syscall.SIGCONT)
	}
}

// stateOf returns the state of a process, 'X' if there is none; see
// proc_pid_stat(5).
func stateOf(pid int) rune {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, found := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " ")
	if !found || rest == "" {
		return 'X'
	}
	return rune(rest[0])
}

// awaitExit returns when a child has ended, and leaves it to be waited for: so
// long, its pid is nobody else's. See waitid(2).
func awaitExit(process *os.Process) {
	const byPid = 1
	var info [128]byte // siginfo_t
	for {
		_, _, err := syscall.Syscall6(syscall.SYS_WAITID, byPid, uintptr(process.Pid),
			uintptr(unsafe.Pointer(&info)), syscall.WEXITED|syscall.WNOWAIT, 0, 0)
		if err != syscall.EINTR {
			return
		}
	}
}

// Processes returns the pids of all processes that live and run for a sandbox
// under the given root: shims, guestds, workloads, and what these started.
// Tests use it to see that nothing is left.
func Processes(root string) ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, file := range files {
		environ, err := os.ReadFile(file) // empty, of a zombie
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue
		}
		if err != nil && !errors.Is(err, os.ErrPermission) {
			return nil, err
		}
		// guestd shows its environment to nobody.
		arguments, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "cmdline"))
		marked := bytes.Contains(environ, []byte(rootVariable+"="+root+"\x00"))
		if marked || bytes.Contains(arguments, []byte("\x00"+guestdFlag+"\x00")) && bytes.Contains(arguments, []byte("\x00"+root+"/")) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
