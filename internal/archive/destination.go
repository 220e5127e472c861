package archive

import (
	"fmt"
	"path"
	"strings"
)

// Stat is what Destination must know of a path, on whichever side it is. Links
// are followed at a destination, and at a source if the copy follows them.
type Stat struct {
	Exists bool
	Folder bool
}

// Destination says where a copy of source to dest goes, as cp -a says it:
//
//	source         dest             gives
//	a file         a file           that file, replaced
//	a file         nothing          a file of that name
//	a file         nothing, d/      an error: there is no such folder
//	a file         a folder         a file in it, of the source's name
//	a folder       a file           an error
//	a folder       nothing          a folder of that name
//	a folder       a folder         a folder in it, of the source's name
//	a folder, s/.  a folder         its contents, merged
//	a folder, s/.  nothing          a folder of that name
//
// The folder is where to unpack, and name is the Rename to do it with: "." if
// the contents go right into it. For dest "d" the folder is ".". It is pure:
// paths are as a person typed them, with slashes, and a "/." or "/" at their
// ends still there.
func Destination(source string, from Stat, dest string, to Stat) (folder, name string, err error) {
	switch {
	case source == "" || dest == "":
		return "", "", fmt.Errorf("%w: a path is empty", ErrRefused)
	case !from.Exists:
		return "", "", fmt.Errorf("%w: there is no %s", ErrRefused, source)
	case !from.Folder && asFolder(source):
		return "", "", fmt.Errorf("%w: %s is no folder", ErrRefused, source)
	case to.Exists && to.Folder:
		return path.Clean(dest), inFolder(source), nil
	case to.Exists && (from.Folder || asFolder(dest)):
		return "", "", fmt.Errorf("%w: %s is no folder", ErrRefused, dest)
	case !from.Folder && asFolder(dest):
		return "", "", fmt.Errorf("%w: there is no folder %s", ErrRefused, dest)
	}
	clean := path.Clean(dest)
	if base := path.Base(clean); base == "." || base == ".." || base == "/" {
		return "", "", fmt.Errorf("%w: there is no folder %s", ErrRefused, dest)
	}
	return path.Dir(clean), path.Base(clean), nil
}

// asFolder reports whether a path can only be a folder's.
func asFolder(p string) bool {
	return p == "." || p == ".." || strings.HasSuffix(p, "/") || strings.HasSuffix(p, "/.") || strings.HasSuffix(p, "/..")
}

// inFolder returns the name of a source in a folder that it is copied to.
func inFolder(source string) string {
	if source == "." || strings.HasSuffix(source, "/.") {
		return "."
	}
	// One without a name of its own, "/" or "..", brings its contents.
	if base := path.Base(path.Clean(source)); base != "/" && base != ".." {
		return base
	}
	return "."
}
