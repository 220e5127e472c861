package main

import (
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/mdlayher/vsock"

	"github.com/choiros/agent/internal/guest/wire"
)

// listenVsock listens at a port of the virtual machine that this runs in.
func listenVsock(port string) (net.Listener, error) {
	number, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return nil, err
	}
	l, err := vsock.Listen(uint32(number), nil)
	if err != nil {
		return nil, err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err == nil && slices.Contains(strings.Fields(string(cmdline)), "choiros.credit=1") {
		return creditListener{l}, nil
	}
	return l, nil
}

// creditListener is one of a machine whose vsock needs wire.WithCredit.
type creditListener struct{ net.Listener }

func (l creditListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return wire.WithCredit(conn), nil
}
