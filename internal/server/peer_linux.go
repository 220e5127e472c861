package server

import (
	"net"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peerOf asks the kernel who connected: SO_PEERCRED of unix(7), and
// SO_PEERGROUPS of socket(7) for the supplementary groups.
func peerOf(conn *net.UnixConn) (Caller, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Caller{}, err
	}
	var caller Caller
	var inner error
	err = raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); inner != nil {
			inner = os.NewSyscallError("getsockopt SO_PEERCRED", inner)
			return
		}
		caller.UID, caller.GIDs = int(cred.Uid), []int{int(cred.Gid)}
		var groups []uint32
		if groups, inner = peerGroups(fd); inner != nil {
			inner = os.NewSyscallError("getsockopt SO_PEERGROUPS", inner)
			return
		}
		for _, gid := range groups {
			caller.GIDs = append(caller.GIDs, int(gid))
		}
	})
	if err == nil {
		err = inner
	}
	return caller, err
}

// peerGroups grows its buffer to the size that the kernel asks for with ERANGE.
func peerGroups(fd uintptr) ([]uint32, error) {
	groups := make([]uint32, 64)
	for {
		size := uint32(len(groups) * 4)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return groups[:size/4], nil
		case errno == unix.ERANGE && int(size/4) > len(groups):
			groups = make([]uint32, size/4)
		default:
			return nil, errno
		}
	}
}
