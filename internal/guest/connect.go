package guest

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

// Connect opens a connection to a port inside, where a service bound to the
// sandbox's own 127.0.0.1 is reached, too. If nothing accepts there the error
// wraps sandbox.ErrRefused.
//
// Where the guest channel is a unix socket, what is returned is the connection
// itself, made inside and passed out: a *net.TCPConn, or a connected
// *net.UDPConn. Elsewhere its bytes go over the channel; CloseWrite is there
// either way, and each Read and Write of a UDP one is a datagram.
func (g *Guest) Connect(ctx context.Context, port uint16, udp bool) (net.Conn, error) {
	op := fmt.Sprintf("connect to port %d of", port)
	caller := ctx
	ctx, cancel := context.WithTimeout(caller, answerLimit)
	defer cancel()
	raw, err := g.dial(ctx)
	if err != nil {
		return nil, g.late(caller, ctx, op, err)
	}
	conn := wire.New(raw, wire.MaxFromGuest)
	unbind := conn.Bind(ctx)
	passed := wire.CanPassDescriptors(raw)
	connected, err := g.connect(ctx, conn, op, &guestv1.Connect{Port: uint32(port), Udp: udp, PassDescriptor: passed})
	unbind()
	if passed || err != nil {
		raw.Close()
		return connected, err
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		raw.Close()
		return nil, g.broken(ctx, op, err)
	}
	return connected, nil
}

func (g *Guest) connect(ctx context.Context, conn *wire.Conn, op string, call *guestv1.Connect) (net.Conn, error) {
	request := &guestv1.Request{Protocol: wire.Protocol, Call: &guestv1.Request_Connect{Connect: call}}
	if err := conn.Send(request); err != nil {
		return nil, g.broken(ctx, op, err)
	}
	if !call.GetPassDescriptor() {
		if _, err := g.answer(ctx, conn, op); err != nil {
			return nil, err
		}
		if call.GetUdp() {
			return newDatagrams(conn.NetConn()), nil
		}
		return conn.NetConn(), nil
	}
	var response guestv1.Response
	fds, err := conn.ReceiveDescriptors(&response, 1)
	if err != nil {
		return nil, g.broken(ctx, op, err)
	}
	var file *os.File
	if len(fds) > 0 {
		file = os.NewFile(uintptr(fds[0]), "passed")
		defer file.Close()
	}
	switch failure := response.GetFailure(); {
	case failure != nil:
		return nil, g.failed(op, failure, response.GetProtocol())
	case file == nil:
		return nil, g.odd(op, "it passed no connection")
	}
	return g.adopt(op, file, call.GetUdp())
}

// adopt takes a descriptor for the connection that was asked for, if it is one.
func (g *Guest) adopt(op string, file *os.File, udp bool) (net.Conn, error) {
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, g.odd(op, "what it passed is no connection")
	}
	switch c := conn.(type) {
	case *net.TCPConn:
		if !udp && c.RemoteAddr() != nil {
			return c, nil
		}
	case *net.UDPConn:
		if udp && c.RemoteAddr() != nil {
			return c, nil
		}
	}
	conn.Close()
	return nil, g.odd(op, "what it passed is not the connection that was asked for")
}
