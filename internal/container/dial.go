package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/sandbox"
)

// Dial implements sandbox.Driver. It does not ask Podman: the socket of a
// guest that is gone refuses connections.
//
// Everybody inside can write to the folder of sockets, and put one of their
// own into the place of guestd's. So on port wire.Port the one that listens has
// to be the first process of a sandbox, and else the error wraps
// sandbox.ErrGuest. That needs Linux; elsewhere sandboxes are in a virtual
// machine, whose processes cannot be told apart from outside.
func (d *Driver) Dial(ctx context.Context, ref sandbox.Ref, port uint32) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	conn, err := dialPatiently(ctx, filepath.Join(ref.Dir, "guest"), strconv.FormatUint(uint64(port), 10)+".sock")
	if err == nil && port == wire.Port {
		if err = checkFirst(conn, d.own); err != nil {
			conn.Close()
		}
	}
	if err == nil {
		return conn, nil
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		err = fmt.Errorf("%w: nothing listens there", sandbox.ErrUnavailable)
	}
	return nil, op(fmt.Sprintf("dial port %d of", port), ref.ID, err)
}

// backlogPause is between two attempts to connect to one who does not accept.
const backlogPause = 5 * time.Millisecond

// dialPatiently waits for room among those that wait to be accepted. Linux
// knows no way to do so but to try again: connect(2), EAGAIN.
func dialPatiently(ctx context.Context, dir, name string) (net.Conn, error) {
	for {
		conn, err := dialGuest(ctx, dir, name)
		if !errors.Is(err, syscall.EAGAIN) {
			return conn, err
		}
		if err := pause(ctx, backlogPause); err != nil {
			return nil, err
		}
	}
}

// errNotSocket is something else that the guest has put in a socket's place.
var errNotSocket = fmt.Errorf("%w: it is not a socket", sandbox.ErrUnavailable)

// errNotFirst is somebody else who listens where guestd should.
var errNotFirst = fmt.Errorf("%w: what listens there is not guestd", sandbox.ErrGuest)
