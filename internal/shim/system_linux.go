package shim

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"unsafe"
)

// self is the program that this process runs, also if its file was replaced
// meanwhile, as an upgrade does: proc_pid_exe(5).
func self() (string, error) { return "/proc/self/exe", nil }

// detached makes a process that outlives this one and its terminal.
func detached() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setsid: true, PidFD: new(int)}
}

// BootID tells this boot of the host from every other: random(4).
func BootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
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
			return !errors.Is(waitid(pidfd), syscall.EAGAIN)
		})
	}()
}

// waitid reaps the child of a pidfd that is not blocking: waitid(2).
func waitid(pidfd uintptr) error {
	const byPidfd = 3
	var info [128]byte // siginfo_t
	for {
		_, _, err := syscall.Syscall6(syscall.SYS_WAITID, byPidfd, pidfd,
			uintptr(unsafe.Pointer(&info)), syscall.WEXITED, 0, 0)
		switch err {
		case 0:
			return nil
		case syscall.EINTR:
		default:
			return err
		}
	}
}
