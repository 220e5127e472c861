package files

import (
	"context"
	"io/fs"
	"os"
	"path"
	"strings"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/archive"
	"github.com/choiros/agent/internal/guest/wire"
)

// Pack serves a call. The names of "/" begin with ".". What cannot be packed
// in a folder, devices and such, is left out.
func (s *Service) Pack(ctx context.Context, conn *wire.Conn, call *guestv1.Pack) error {
	p := call.GetPath()
	if err := check(p); err != nil {
		return err
	}
	file, err := look(p, p)
	if err == nil && call.GetFollow() && file.GetKind() == guestv1.FileInfo_KIND_LINK {
		var info fs.FileInfo
		if info, err = os.Stat(p); err == nil {
			file = describe(p, info)
		}
	}
	if err != nil {
		return translate(err)
	}
	if file.GetKind() == guestv1.FileInfo_KIND_UNSPECIFIED {
		return invalid("path %q is no file, folder or link", p)
	}
	name := path.Base(p)
	if p == "/" {
		name = "."
	}
	defer conn.Bind(ctx)()
	if err := succeed(conn, &guestv1.Response{Result: &guestv1.Response_File{File: file}}); err != nil {
		return err
	}
	if err := archive.Pack(ctx, conn.Writer(wire.KindData), p, name, archive.PackOptions{Follow: call.GetFollow()}); err != nil {
		return translate(err)
	}
	return finish(conn, &guestv1.Response{})
}

// Unpack serves a call. The agent, which may do anything here, is trusted with
// links and modes; names still lead nowhere but into the folder.
func (s *Service) Unpack(ctx context.Context, conn *wire.Conn, call *guestv1.Unpack) error {
	if err := check(call.GetPath()); err != nil {
		return err
	}
	if name := call.GetRename(); name == ".." || strings.Contains(name, "/") {
		return invalid("rename %q is not the name of a file", name)
	}
	if err := os.MkdirAll(call.GetPath(), 0o755); err != nil {
		return translate(err)
	}
	root, err := os.OpenRoot(call.GetPath())
	if err != nil {
		return translate(err)
	}
	defer root.Close()
	defer conn.Bind(ctx)()
	if err := succeed(conn, &guestv1.Response{}); err != nil {
		return err
	}
	sum, err := archive.Unpack(ctx, conn.Reader(), root, archive.UnpackOptions{
		Rename: call.GetRename(), Owners: call.GetOwners(), SetID: true, AnyLinks: true,
	})
	if err != nil {
		return translate(err)
	}
	return succeed(conn, transferred(sum.Files, sum.Bytes))
}
