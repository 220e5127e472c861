//go:build linux

package guestd

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/guest/wire"
)

// lastReservedPort is the last of vsock's ports that take CAP_NET_BIND_SERVICE:
// LAST_RESERVED_PORT of net/vmw_vsock/af_vsock.c.
const lastReservedPort = 1023

// dialHost connects to the shim, which may be slower to listen than guestd is
// to start.
func dialHost(ctx context.Context, port uint32) (net.Conn, error) {
	for {
		conn, err := dialReserved(hostCID, port)
		if err == nil {
			return conn, nil
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// dialReserved connects from a port that shows that this is no program of an
// ordinary user's, if guestd may have one. It is one by chance: the host may
// have a connection yet from the port that a boot before this one called from.
func dialReserved(cid, port uint32) (net.Conn, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	own := &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: 1 + rand.Uint32N(lastReservedPort)}
	if err := unix.Bind(fd, own); err != nil && !errors.Is(err, unix.EACCES) {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	// It waits for two seconds at most.
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: cid, Port: port}); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	return wire.NewSocket(fd)
}

// bootID tells this boot of the kernel from every other; empty: it cannot be
// had. See proc_sys_kernel(5).
func bootID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
}
