package shim

import (
	"context"
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// DialSocket connects to a unix socket in the box. There is no limit on the
// path: the folder is opened, and the socket found in what was opened (proc(5),
// /proc/pid/fd); see unix(7) for the 108 bytes of sun_path.
func (b Box) DialSocket(ctx context.Context, name string) (net.Conn, error) {
	dir, err := unix.Open(b.Dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: b.Dir, Err: err}
	}
	defer unix.Close(dir)
	return new(net.Dialer).DialContext(ctx, "unix", "/proc/self/fd/"+strconv.Itoa(dir)+"/"+name)
}
