//go:build !linux

package shim

import (
	"context"
	"net"
)

// DialSocket connects to a unix socket in the box, whose path may be no longer
// than unix(4) allows.
func (b Box) DialSocket(ctx context.Context, name string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "unix", b.Path(name))
}
