//go:build linux

package guestd

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

// intruderFlag makes the test binary be a process of the sandbox that wants to
// speak to guestd.
const intruderFlag = "-intruder"

// intrude exits with 0 if guestd does not serve it.
func intrude(socket string) int {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		fmt.Println(err)
		return 2
	}
	c := wire.New(conn, wire.MaxFrame)
	_ = c.Send(&guestv1.Request{Call: &guestv1.Request_Hello{Hello: &guestv1.Hello{}}})
	var response guestv1.Response
	if c.ReceiveMessage(&response) == nil {
		fmt.Println("served")
		return 1
	}
	return 0
}

func TestSocketOfPastLifeIsReplaced(t *testing.T) {
	t.Parallel()
	g := boot(t, nil, sleeper()...)
	_ = g.cmd.Process.Kill()
	g.exits()
	if _, err := os.Stat(g.socket); err != nil {
		t.Fatalf("a killed guestd leaves its socket: %v", err)
	}
	again := boot(t, func(cmd *exec.Cmd) { cmd.Args[3] = "unix:" + g.socket }, sleeper()...)
	again.eventually("it answers", func() bool {
		conn, err := net.Dial("unix", g.socket)
		if err != nil {
			return false
		}
		return conn.Close() == nil
	})
	info, err := os.Stat(g.socket)
	if err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	again.hello()
}

func TestHostileBytesHarmNobody(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	for _, hostile := range [][]byte{
		nil,
		{0},
		{0xff, 0xff, 0xff, 0xff, 0},
		{0, 0, 0, 1, 0},
		{0, 0, 0, 1, 0, 0xff},
		{0, 0, 0, 0, 9},
		{0, 0, 0, 0, 0},
		{0, 0, 0, 0, 1},
		{0, 0, 0, 4, 2, 1, 2, 3, 4},
		[]byte("GET / HTTP/1.1\r\n\r\n"),
		bytes.Repeat([]byte{0xa5}, 1<<16),
		{0, 0, 0, 3, 0, 0xea, 0x3e, 0x00},
	} {
		conn := g.dial()
		_, _ = conn.NetConn().Write(hostile)
		if unixConn, ok := conn.NetConn().(*net.UnixConn); ok {
			_ = unixConn.CloseWrite()
		}
		for {
			if _, _, err := conn.Receive(); err != nil {
				break
			}
		}
		conn.Close()
	}
	g.refused(guestv1.Failure_CODE_UNIMPLEMENTED, &guestv1.Request{})
	g.hello()
}

func TestSilentPeersKeepNobodyOut(t *testing.T) {
	t.Parallel()
	g := configured(t, sleeper()...)
	var conns []net.Conn
	for range 2000 {
		conn, err := net.Dial("unix", g.socket)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	begin := time.Now()
	g.output(&guestv1.Exec{Command: []string{"true"}})
	if took := time.Since(begin); took > requestLimit/2 {
		t.Errorf("it took %v", took)
	}
	for _, conn := range conns {
		conn.Close()
	}
}

func TestSilentPeerIsDropped(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes " + requestLimit.String())
	}
	g := configured(t, sleeper()...)
	conn := g.dial()
	if _, _, err := conn.Receive(); err == nil {
		t.Error("it was answered")
	}
}
