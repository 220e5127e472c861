package guest

import (
	"context"
	"errors"
	"io"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

// File describes a file inside. Name and Target are as the guest gives them:
// whoever shows them to a terminal cleans them.
type File struct {
	Name     string
	Kind     guestv1.FileInfo_Kind
	Size     uint64
	Mode     uint32 // permission bits, 07777
	UID, GID uint32
	Modified time.Time
	Target   string // of a link
}

func fileFromWire(w *guestv1.FileInfo) File {
	return File{
		Name: w.GetName(), Kind: w.GetKind(), Size: w.GetSizeBytes(), Mode: w.GetMode() & 0o7777,
		UID: w.GetUid(), GID: w.GetGid(), Modified: w.GetModifyTime().AsTime(), Target: w.GetTarget(),
	}
}

// maxFiles is how many a page of a listing may have.
const maxFiles = 1000

// Stat returns a file itself: links are not followed.
func (g *Guest) Stat(ctx context.Context, path string) (File, error) {
	const op = "look at a file of"
	response, err := g.ask(ctx, op, &guestv1.Request{Call: &guestv1.Request_StatFile{StatFile: &guestv1.StatFile{Path: path}}})
	if err != nil {
		return File{}, err
	}
	if response.GetFile() == nil {
		return File{}, g.odd(op, "it says nothing of the file")
	}
	return fileFromWire(response.GetFile()), nil
}

// List returns up to limit files of a folder, in the order of their names,
// beginning after the name after; more says whether others follow.
func (g *Guest) List(ctx context.Context, path, after string, limit int) (files []File, more bool, err error) {
	response, err := g.ask(ctx, "list files of", &guestv1.Request{Call: &guestv1.Request_ListFiles{
		ListFiles: &guestv1.ListFiles{Path: path, After: after, Limit: uint32(min(limit, maxFiles))}, //nolint:gosec // Bounded.
	}})
	if err != nil {
		return nil, false, err
	}
	listed := response.GetFiles().GetFiles()
	for _, f := range listed[:min(len(listed), maxFiles)] {
		files = append(files, fileFromWire(f))
	}
	return files, response.GetFiles().GetMore(), nil
}

// Remove removes a file, or a folder with all that is in it if recursive.
func (g *Guest) Remove(ctx context.Context, path string, recursive bool) error {
	_, err := g.ask(ctx, "remove a file of", &guestv1.Request{Call: &guestv1.Request_RemoveFile{
		RemoveFile: &guestv1.RemoveFile{Path: path, Recursive: recursive},
	}})
	return err
}

// MakeFolder makes a folder; one that is there is left as it is.
func (g *Guest) MakeFolder(ctx context.Context, path string, mode uint32, parents bool) error {
	_, err := g.ask(ctx, "make a folder in", &guestv1.Request{Call: &guestv1.Request_MakeFolder{
		MakeFolder: &guestv1.MakeFolder{Path: path, Mode: mode, Parents: parents},
	}})
	return err
}

// Download is a file, or an archive, on its way out.
type Download struct {
	File File

	guest *Guest
	conn  *wire.Conn
	ctx   context.Context //nolint:containedctx // The call's, which is a connection.
	op    string
	undo  func() bool
	body  io.Reader
	end   error // once there is no more
}

// Read returns the bytes; io.EOF means that all of them came.
func (d *Download) Read(p []byte) (int, error) {
	if d.end != nil {
		return 0, d.end
	}
	n, err := d.body.Read(p)
	switch {
	case err == nil || n > 0:
		return n, nil
	case !errors.Is(err, io.EOF):
		d.end = d.guest.broken(d.ctx, d.op, err)
	default:
		// Only what follows the bytes says whether they are all.
		if _, d.end = d.guest.answer(d.ctx, d.conn, d.op); d.end == nil {
			d.end = io.EOF
		}
	}
	return 0, d.end
}

// Close ends the call.
func (d *Download) Close() {
	d.undo()
	d.conn.Close()
}

// Read returns a file's bytes from offset; length zero: to its end. If ctx
// ends, so does reading.
func (g *Guest) Read(ctx context.Context, path string, offset, length uint64) (*Download, error) {
	return g.download(ctx, "read a file of", &guestv1.Request{Call: &guestv1.Request_ReadFile{
		ReadFile: &guestv1.ReadFile{Path: path, Offset: offset, Length: length},
	}})
}

// Pack returns a file or a folder as a tar stream. If ctx ends, so does it.
func (g *Guest) Pack(ctx context.Context, path string, follow bool) (*Download, error) {
	return g.download(ctx, "pack files of", &guestv1.Request{Call: &guestv1.Request_Pack{
		Pack: &guestv1.Pack{Path: path, Follow: follow},
	}})
}

func (g *Guest) download(ctx context.Context, op string, request *guestv1.Request) (*Download, error) {
	conn, response, err := g.open(ctx, op, request)
	if err != nil {
		return nil, err
	}
	if response.GetFile() == nil {
		conn.Close()
		return nil, g.odd(op, "it says nothing of the file")
	}
	return &Download{
		File:  fileFromWire(response.GetFile()),
		guest: g, conn: conn, ctx: ctx, op: op, undo: conn.Bind(ctx), body: conn.Reader(),
	}, nil
}

// Upload is a file, or an archive, on its way in.
type Upload struct {
	guest *Guest
	conn  *wire.Conn
	ctx   context.Context //nolint:containedctx // The call's, which is a connection.
	op    string
	undo  func() bool
}

// Write sends bytes. If guestd has given up on them, the error says why.
func (u *Upload) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil // would be the end
	}
	if err := u.conn.SendData(wire.KindData, p); err != nil {
		return 0, u.why(err)
	}
	return len(p), nil
}

// why is what guestd has said before it closed the connection, if anything.
func (u *Upload) why(err error) error {
	if _, said := u.guest.answer(u.ctx, u.conn, u.op); said != nil {
		return said
	}
	return u.guest.broken(u.ctx, u.op, err)
}

// Finish says that all bytes were sent, and returns once they are in place.
func (u *Upload) Finish() (files, bytes uint64, err error) {
	if err := u.conn.SendData(wire.KindData, nil); err != nil {
		return 0, 0, u.why(err)
	}
	response, err := u.guest.answer(u.ctx, u.conn, u.op)
	if err != nil {
		return 0, 0, err
	}
	return response.GetTransferred().GetFiles(), response.GetTransferred().GetBytes(), nil
}

// Close ends the call; without Finish before, a file stays as it was.
func (u *Upload) Close() {
	u.undo()
	u.conn.Close()
}

// Write replaces a file, in one step once all is there. mode nil: that of the
// file it replaces, else 0644.
func (g *Guest) Write(ctx context.Context, path string, mode *uint32, parents bool) (*Upload, error) {
	return g.upload(ctx, "write a file of", &guestv1.Request{Call: &guestv1.Request_WriteFile{
		WriteFile: &guestv1.WriteFile{Path: path, Mode: mode, Parents: parents},
	}})
}

// Unpack unpacks a tar stream in a folder. rename, if not empty, is what the
// first element of the names in it becomes.
func (g *Guest) Unpack(ctx context.Context, path, rename string, owners bool) (*Upload, error) {
	return g.upload(ctx, "unpack files in", &guestv1.Request{Call: &guestv1.Request_Unpack{
		Unpack: &guestv1.Unpack{Path: path, Rename: rename, Owners: owners},
	}})
}

func (g *Guest) upload(ctx context.Context, op string, request *guestv1.Request) (*Upload, error) {
	conn, _, err := g.open(ctx, op, request)
	if err != nil {
		return nil, err
	}
	return &Upload{guest: g, conn: conn, ctx: ctx, op: op, undo: conn.Bind(ctx)}, nil
}

// maxChanges is how many one message may have.
const maxChanges = 256

// WatchFiles calls see with what changes, first with nothing once it watches,
// until ctx ends, the connection does, or see returns an error, which
// WatchFiles then returns. lost says that some changes were.
func (g *Guest) WatchFiles(ctx context.Context, path string, recursive bool, see func(changes []*guestv1.FileChange, lost bool) error) error {
	const op = "watch files of"
	conn, _, err := g.open(ctx, op, &guestv1.Request{Call: &guestv1.Request_WatchFiles{
		WatchFiles: &guestv1.WatchFiles{Path: path, Recursive: recursive},
	}})
	if err != nil {
		return err
	}
	defer conn.Close()
	defer conn.Bind(ctx)()
	if err := see(nil, false); err != nil {
		return err
	}
	for {
		var changes guestv1.FileChanges
		if err := conn.ReceiveMessage(&changes); err != nil {
			return g.broken(ctx, op, err)
		}
		if err := see(changes.GetChanges()[:min(maxChanges, len(changes.GetChanges()))], changes.GetLost()); err != nil {
			return err
		}
	}
}
