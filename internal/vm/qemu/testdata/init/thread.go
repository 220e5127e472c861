package main

import (
	"os"
	"runtime"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// asUser runs one of the commands on files with another user's rights. The
// rights are the thread's, which therefore ends with the goroutine.
func asUser(args []string) (string, error) {
	if len(args) < 3 {
		return "", errUsage
	}
	uid, err := strconv.Atoi(args[0])
	if err != nil {
		return "", err
	}
	type result struct {
		answer string
		err    error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
			if _, _, errno := unix.RawSyscall(call, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
				done <- result{err: errno}
				return
			}
		}
		answer, err := files(args[1], args[2:])
		done <- result{answer, err}
	}()
	got := <-done
	return got.answer, got.err
}

func discard(device *os.File, span *[2]uint64) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(span))); errno != 0 {
		return os.NewSyscallError("ioctl BLKDISCARD", errno)
	}
	return nil
}

// up switches a network interface on.
func up(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request)
}
