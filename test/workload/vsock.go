package main

import (
	"net"
	"strconv"

	"github.com/mdlayher/vsock"
)

// listenVsock listens at a port of the virtual machine that this runs in.
func listenVsock(port string) (net.Listener, error) {
	number, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return nil, err
	}
	return vsock.Listen(uint32(number), nil)
}
