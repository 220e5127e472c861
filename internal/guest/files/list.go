package files

import (
	"cmp"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"

	"google.golang.org/protobuf/proto"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

const (
	maxPage  = 1000
	maxBytes = wire.MaxFromGuest / 2 // of one message with names in it
	readdir  = 256                   // names read at once
)

// ListFiles serves a call. A page also ends where its message would be long.
func (s *Service) ListFiles(ctx context.Context, conn *wire.Conn, call *guestv1.ListFiles) error {
	if err := check(call.GetPath()); err != nil {
		return err
	}
	limit := int(min(call.GetLimit(), maxPage))
	if limit == 0 {
		limit = maxPage
	}
	names, err := namesAfter(ctx, call.GetPath(), call.GetAfter(), limit+1)
	if err != nil {
		return translate(err)
	}
	page := &guestv1.Files{}
	size := 0
	for _, name := range names {
		if len(page.GetFiles()) == limit || size > maxBytes {
			page.More = true
			break
		}
		file, err := look(name, path.Join(call.GetPath(), name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it went away
		}
		if err != nil {
			return translate(err)
		}
		page.Files = append(page.Files, file)
		size += proto.Size(file)
	}
	return succeed(conn, &guestv1.Response{Result: &guestv1.Response_Files{Files: page}})
}

// namesAfter returns the first few names of a folder that come after one. The
// order is that of the names as they are shown, since after is one of those.
func namesAfter(ctx context.Context, p, after string, few int) ([]string, error) {
	dir, err := os.OpenFile(p, os.O_RDONLY|folderOnly, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var names []string
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		some, err := dir.Readdirnames(readdir)
		for _, name := range some {
			if valid(name) > after {
				names = append(names, name)
			}
		}
		if len(names) > 2*few {
			names = first(names, few)
		}
		if errors.Is(err, io.EOF) {
			return first(names, few), nil
		}
		if err != nil {
			return nil, err
		}
	}
}

func first(names []string, few int) []string {
	slices.SortFunc(names, func(a, b string) int { return cmp.Or(cmp.Compare(valid(a), valid(b)), cmp.Compare(a, b)) })
	return names[:min(len(names), few)]
}
