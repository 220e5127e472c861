package image

import (
	"io"
	"io/fs"
	"path"
	"strings"
	"time"

	"github.com/erofs/go-erofs"
)

// view shows a finished tree as a file system to go-erofs, which can copy one.
// Of an inode with several names all but the first look like an empty file of
// its kind: see relink. It leaves the tree as it is.
type view struct {
	root    *inode
	content io.ReaderAt // the scratch file
}

// find returns what a path leads to.
func (v *view) find(op, name string) (*entry, error) {
	at := &entry{inode: v.root}
	if name == "." {
		return at, nil
	}
	for part := range strings.SplitSeq(name, "/") {
		if at = at.inode.children[part]; at == nil {
			return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
		}
	}
	return at, nil
}

// Open implements fs.FS.
func (v *view) Open(name string) (fs.File, error) {
	e, err := v.find("open", name)
	if err != nil {
		return nil, err
	}
	content := io.NewSectionReader(v.content, e.inode.offset, e.inode.size)
	return &viewFile{entryInfo{path.Base(name), e}, content}, nil
}

// ReadDir implements fs.ReadDirFS.
func (v *view) ReadDir(name string) ([]fs.DirEntry, error) {
	e, err := v.find("readdir", name)
	if err != nil {
		return nil, err
	}
	entries := make([]fs.DirEntry, 0, len(e.inode.children))
	for _, child := range e.inode.names() {
		entries = append(entries, fs.FileInfoToDirEntry(entryInfo{child, e.inode.children[child]}))
	}
	return entries, nil
}

// ReadLink is what go-erofs asks for a symbolic link's target.
func (v *view) ReadLink(name string) (string, error) {
	e, err := v.find("readlink", name)
	if err != nil || e.alias {
		return "", err
	}
	return e.inode.target, nil
}

// viewFile is an open file.
type viewFile struct {
	info entryInfo
	*io.SectionReader
}

func (f *viewFile) Stat() (fs.FileInfo, error) { return f.info, nil }
func (f *viewFile) Close() error               { return nil }

// entryInfo implements fs.FileInfo.
type entryInfo struct {
	name  string
	entry *entry
}

func (i entryInfo) Name() string { return i.name }
func (i entryInfo) IsDir() bool  { return i.entry.inode.kind == folder }

func (i entryInfo) Size() int64 {
	if i.entry.alias {
		return 0
	}
	return i.entry.inode.size
}

func (i entryInfo) ModTime() time.Time {
	return time.Unix(i.entry.inode.seconds, int64(i.entry.inode.nanos))
}

func (i entryInfo) Mode() fs.FileMode {
	n := i.entry.inode
	mode := fs.FileMode(n.mode & 0o777)
	for bit, flag := range map[uint16]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if n.mode&bit != 0 {
			mode |= flag
		}
	}
	switch n.kind {
	case folder:
		mode |= fs.ModeDir
	case symlink:
		mode |= fs.ModeSymlink
	case charDevice:
		mode |= fs.ModeDevice | fs.ModeCharDevice
	case blockDevice:
		mode |= fs.ModeDevice
	case fifo:
		mode |= fs.ModeNamedPipe
	case regular:
	}
	return mode
}

// Sys returns what go-erofs copies besides: an *erofs.Stat.
func (i entryInfo) Sys() any {
	n := i.entry.inode
	if i.entry.alias {
		return &erofs.Stat{Nlink: 1}
	}
	return &erofs.Stat{
		UID: n.uid, GID: n.gid, Mtime: uint64(n.seconds), MtimeNs: n.nanos, Nlink: int(n.nlink),
		Rdev: deviceNumber(n.major, n.minor), Xattrs: diskXattrs(n.xattrs),
	}
}

// deviceNumber is a device as it is kept on disk, see new_encode_dev in the
// kernel's kdev_t.h.
func deviceNumber(major, minor uint32) uint32 {
	return minor&0xff | major<<8 | (minor&^0xff)<<12
}

// diskXattrs returns attributes by the names that make go-erofs write them
// right. On disk a name is the number of a prefix and the rest; of access
// control lists the prefix is the whole name, where go-erofs expects one more dot.
func diskXattrs(xattrs map[string]string) map[string]string {
	for _, acl := range []string{aclAccess, aclDefault} {
		if _, ok := xattrs[acl]; ok {
			named := make(map[string]string, len(xattrs))
			for name, value := range xattrs {
				if name == aclAccess || name == aclDefault {
					name += "."
				}
				named[name] = value
			}
			return named
		}
	}
	return xattrs
}
