package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// detached makes a process that outlives this one and its terminal.
func detached() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setsid: true, PidFD: new(int)}
}

// confined makes a process group that does not outlive the calling thread.
func confined() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
}

// bootID tells this boot of the host from every other: random(4).
func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
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

// reap sees to it that a child is waited for once it ends, should this process
// live that long: else it would stay as a zombie. The goroutine waits for
// nothing else, and so nobody waits for it; it costs no thread.
func reap(cmd *exec.Cmd) {
	pidfd := *cmd.SysProcAttr.PidFD
	if pidfd < 0 || syscall.SetNonblock(pidfd, true) != nil {
		go func() { _ = cmd.Wait() }()
		return
	}
	child := os.NewFile(uintptr(pidfd), "pidfd") // in the poller: pidfd_open(2)
	_ = cmd.Process.Release()
	go func() {
		defer child.Close()
		conn, err := child.SyscallConn()
		if err != nil {
			return
		}
		_ = conn.Read(func(pidfd uintptr) bool {
			return !errors.Is(waitid(pidfdType, pidfd, syscall.WEXITED), syscall.EAGAIN)
		})
	}()
}

// awaitExit returns when a child has ended, and leaves it to be waited for: so
// long, its pid is nobody else's. See waitid(2).
func awaitExit(process *os.Process) {
	_ = waitid(pidType, uintptr(process.Pid), syscall.WEXITED|syscall.WNOWAIT)
}

// What the second argument of waitid(2) is.
const (
	pidType   = 1
	pidfdType = 3
)

func waitid(idType, id uintptr, options int) error {
	var info [128]byte // siginfo_t
	for {
		_, _, err := syscall.Syscall6(syscall.SYS_WAITID, idType, id,
			uintptr(unsafe.Pointer(&info)), uintptr(options), 0, 0)
		switch err {
		case 0:
			return nil
		case syscall.EINTR:
		default:
			return err
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
