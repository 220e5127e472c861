//go:build !linux

package container

import (
	"context"
	"net"
	"os"
	"path/filepath"
)

// dialGuest connects to a socket in the guest's folder. There is no way to
// connect to a file that was opened before, so a link that the guest puts in
// the socket's place in between is followed. The path has to fit sun_path.
func dialGuest(ctx context.Context, dir, name string) (net.Conn, error) {
	path := filepath.Join(dir, name)
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().Type() != os.ModeSocket {
		return nil, errNotSocket
	}
	return (&net.Dialer{}).DialContext(ctx, "unix", path)
}
