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

	"github.com/choiros/agent/internal/sandbox"
)

// Dial implements sandbox.Driver. It does not ask Podman: the socket of a
// guest that is gone refuses connections.
func (d *Driver) Dial(ctx context.Context, ref sandbox.Ref, port uint32) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	conn, err := dialGuest(ctx, filepath.Join(ref.Dir, "guest"), strconv.FormatUint(uint64(port), 10)+".sock")
	if err == nil {
		return conn, nil
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		err = fmt.Errorf("%w: nothing listens there", sandbox.ErrUnavailable)
	}
	return nil, op(fmt.Sprintf("dial port %d of", port), ref.ID, err)
}

// errNotSocket is something else that the guest has put in a socket's place.
var errNotSocket = fmt.Errorf("%w: it is not a socket", sandbox.ErrUnavailable)
