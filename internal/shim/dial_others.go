//go:build !linux

package shim

import (
	"context"
	"net"
)

// maxSocket is the longest path that a socket has on any system: sun_path of
// macOS's unix(4) has 104 bytes, the last of them a NUL.
const maxSocket = 103

// DialSocket connects to a unix socket in the box. There is no limit on the
// path.
func (b Box) DialSocket(ctx context.Context, name string) (net.Conn, error) {
	if len(b.Path(name)) > maxSocket {
		return dialLinked(ctx, b.Dir, name)
	}
	return new(net.Dialer).DialContext(ctx, "unix", b.Path(name))
}
