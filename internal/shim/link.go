package shim

import (
	"context"
	"net"
	"os"
	"path/filepath"
)

// dialLinked connects to a socket by way of a short link to its folder, for
// systems on which nothing else leads to a socket whose path is too long. The
// link is in a folder that is this process's alone, and gone when this returns.
func dialLinked(ctx context.Context, dir, name string) (net.Conn, error) {
	temporary, err := os.MkdirTemp("/tmp", "choiros-") // TMPDIR may be as long as dir
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(temporary) }() // an empty folder, at worst
	link := filepath.Join(temporary, "d")
	if err := os.Symlink(dir, link); err != nil {
		return nil, err
	}
	return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(link, name))
}
