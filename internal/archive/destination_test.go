package archive_test

import (
	"testing"

	"github.com/choiros/agent/internal/archive"
)

func TestDestination(t *testing.T) {
	t.Parallel()
	none, file, folder := archive.Stat{}, archive.Stat{Exists: true}, archive.Stat{Exists: true, Folder: true}
	for _, c := range []struct {
		source       string
		from         archive.Stat
		dest         string
		to           archive.Stat
		folder, name string // none: an error
	}{
		{"/a/f", file, "/b/g", file, "/b", "g"},
		{"/a/f", file, "/b/g", none, "/b", "g"},
		{"/a/f", file, "g", none, ".", "g"},
		{"/a/f", file, "/b/g/", none, "", ""},
		{"/a/f", file, "/b/g/", file, "", ""},
		{"/a/f", file, "/b", folder, "/b", "f"},
		{"/a/f", file, ".", folder, ".", "f"},
		{"/a/f", file, "/", folder, "/", "f"},
		{"/a/f/", file, "/b", folder, "", ""},
		{"/a/f/.", file, "/b", folder, "", ""},
		{"/a/d", folder, "/b/g", file, "", ""},
		{"/a/d", folder, "/b/e", none, "/b", "e"},
		{"/a/d", folder, "/b/e/", none, "/b", "e"},
		{"/a/d/", folder, "/b", folder, "/b", "d"},
		{"/a/d", folder, "/b/.", folder, "/b", "d"},
		{"/a/d/.", folder, "/b", folder, "/b", "."},
		{"/a/d/.", folder, "/b/e", none, "/b", "e"},
		{".", folder, "/b", folder, "/b", "."},
		{"..", folder, "/b", folder, "/b", "."},
		{"/", folder, "/b", folder, "/b", "."},
		{"/", folder, "/b/e", none, "/b", "e"},
		{"/a/d", folder, "..", none, "", ""},
		{"/a/d", none, "/b", folder, "", ""},
		{"", folder, "/b", folder, "", ""},
		{"/a", folder, "", folder, "", ""},
	} {
		dir, name, err := archive.Destination(c.source, c.from, c.dest, c.to)
		if dir != c.folder || name != c.name || (err != nil) != (c.folder == "") {
			t.Errorf("%s to %s (%v): %q %q %v", c.source, c.dest, c.to, dir, name, err)
		}
	}
}
