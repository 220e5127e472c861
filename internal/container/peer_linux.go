package container

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// checkFirst wants the one that listens at the other end to be the first
// process of a pid namespace directly below this process's own, as guestd is
// in its container. A namespace that a workload makes is further down, and a
// workload makes none beside its own.
//
// Who listens is whoever called listen(2), see SO_PEERCRED in unix(7), and not
// who has the descriptor now. The numbers that it has in the namespaces, one
// each and the outermost first, are the line NSpid of proc_pid_status(5).
//
// own returns this process's numbers, which never change; see ownNumbers.
func checkFirst(conn net.Conn, own func() ([]int, error)) error {
	peer, err := peerNumbers(conn)
	if err != nil {
		// Kernels differ in what they say of one that listened and is gone.
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
			return errNotFirst
		}
		return fmt.Errorf("find out who listens there: %w", err)
	}
	self, err := own()
	if err != nil {
		return err
	}
	if !isFirst(self, peer) {
		return errNotFirst
	}
	return nil
}

// ownNumbers returns the numbers of this process.
func ownNumbers() ([]int, error) { return numbersIn("/proc/self/status") }

// isFirst reports whether a process with the given numbers is the first of a
// namespace directly below that of a process with own.
func isFirst(own, numbers []int) bool {
	return len(own) > 0 && len(numbers) == len(own)+1 && numbers[len(numbers)-1] == 1
}

// peerNumbers returns the numbers of the process at the other end.
func peerNumbers(conn net.Conn) ([]int, error) {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var path string
	pidfd := -1
	var peerErr error
	err = raw.Control(func(fd uintptr) {
		// A pid may be another process's by now, a pidfd may not: pidfd_open(2).
		if pidfd, peerErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD); peerErr == nil {
			path = "/proc/self/fdinfo/" + strconv.Itoa(pidfd)
			return
		}
		if !errors.Is(peerErr, unix.ENOPROTOOPT) { // before Linux 6.5
			return
		}
		var credentials *unix.Ucred
		if credentials, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); peerErr == nil {
			path = "/proc/" + strconv.Itoa(int(credentials.Pid)) + "/status"
		}
	})
	if err = errors.Join(err, peerErr); err != nil {
		return nil, err
	}
	if pidfd >= 0 {
		defer unix.Close(pidfd)
	}
	return numbersIn(path)
}

// numbersIn reads the line NSpid of a status file, or of a pidfd's fdinfo.
func numbersIn(path string) ([]int, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	numbers, err := parseNumbers(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return numbers, nil
}

func parseNumbers(r io.Reader) ([]int, error) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		list, found := strings.CutPrefix(lines.Text(), "NSpid:")
		if !found {
			continue
		}
		var numbers []int
		for field := range strings.FieldsSeq(list) {
			number, err := strconv.Atoi(field)
			if err != nil {
				return nil, fmt.Errorf("NSpid: %w", err)
			}
			numbers = append(numbers, number)
		}
		return numbers, nil
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	return nil, errors.New("it has no NSpid")
}
