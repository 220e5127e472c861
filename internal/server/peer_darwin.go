package server

import (
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// peerOf asks the kernel who connected: LOCAL_PEERCRED of unix(4), which tells
// up to 16 groups.
func peerOf(conn *net.UnixConn) (Caller, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Caller{}, err
	}
	var caller Caller
	var inner error
	err = raw.Control(func(fd uintptr) {
		var cred *unix.Xucred
		if cred, inner = unix.GetsockoptXucred(int(fd), unix.SOL_LOCAL, unix.LOCAL_PEERCRED); inner != nil {
			inner = os.NewSyscallError("getsockopt LOCAL_PEERCRED", inner)
			return
		}
		caller.UID = int(cred.Uid)
		for _, gid := range cred.Groups[:min(max(cred.Ngroups, 0), int16(len(cred.Groups)))] {
			caller.GIDs = append(caller.GIDs, int(gid))
		}
	})
	if err == nil {
		err = inner
	}
	return caller, err
}
