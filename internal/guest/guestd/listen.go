//go:build linux

package guestd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// hostCID is the host's address on vsock; see vsock(7).
const hostCID = 2

// errStranger is a peer that is not the agent.
var errStranger = errors.New("not the agent")

// channel is the guest channel's listener.
type channel struct {
	net.Listener
	admits func(net.Conn) error
}

// listen opens the guest channel at unix:PATH or vsock:PORT.
func listen(address, trust string) (*channel, error) {
	network, rest, _ := strings.Cut(address, ":")
	switch network {
	case "unix":
		listener, err := listenUnix(rest)
		if err != nil {
			return nil, fmt.Errorf("listen at %s: %w", address, err)
		}
		admits := func(net.Conn) error { return nil }
		if trust == trustOutside {
			admits = fromOutside
		}
		return &channel{Listener: listener, admits: admits}, nil
	case "vsock":
		port, err := strconv.ParseUint(rest, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("listen at %s: %s is no port", address, rest)
		}
		listener, err := vsock.Listen(uint32(port), nil)
		if err != nil {
			return nil, fmt.Errorf("listen at %s: %w", address, err)
		}
		return &channel{Listener: listener, admits: fromHost}, nil
	}
	return nil, fmt.Errorf("listen at %s: neither unix:PATH nor vsock:PORT", address)
}

// listenUnix listens at path, in place of what a past life left there. Whoever
// finds the socket can connect to it: it gets its name once it listens.
func listenUnix(path string) (net.Listener, error) {
	// Short, because a socket's whole path may be no longer than 107 bytes.
	temporary := filepath.Join(filepath.Dir(path), ".g")
	if err := os.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var config net.ListenConfig
	listener, err := config.Listen(context.Background(), "unix", temporary)
	if err != nil {
		return nil, err
	}
	if unixListener, ok := listener.(*net.UnixListener); ok {
		unixListener.SetUnlinkOnClose(false)
	}
	// The agent is another user in here. The folder keeps strangers out.
	err = os.Chmod(temporary, 0o666)
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		_ = os.Remove(temporary)
		listener.Close()
		return nil, err
	}
	return listener, nil
}

// fromOutside admits peers that are in no process namespace below guestd's:
// the kernel has no number for them, and says 0 (SO_PEERCRED in unix(7)).
func fromOutside(conn net.Conn) error {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return errStranger
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	var peerErr error
	err = raw.Control(func(fd uintptr) {
		peer, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	switch {
	case err != nil:
		return err
	case peerErr != nil:
		return peerErr
	case peer.Pid != 0:
		return errStranger
	}
	return nil
}

// fromHost admits the host of a virtual machine.
func fromHost(conn net.Conn) error {
	if remote, ok := conn.RemoteAddr().(*vsock.Addr); ok && remote.ContextID == hostCID {
		return nil
	}
	return errStranger
}
