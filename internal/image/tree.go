package image

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/choiros/agent/internal/sandbox"
)

// Bounds of a merged file system. Every other bound of what an image may take
// in memory follows from them.
const (
	maxEntries  = 2 << 20 // over all layers
	maxPath     = 4096    // PATH_MAX, see limits.h
	maxName     = 255     // NAME_MAX; EROFS_NAME_LEN
	maxDepth    = 512     // folders in folders
	maxTarget   = 4095    // of a symbolic link
	maxXattrs   = 64      // of one file
	maxXattr    = 65535   // bytes of a value; 16 bits of the format
	maxXattrSum = 128 << 10
	// maxMetadata bounds the bytes of all paths, link targets and attributes.
	maxMetadata = 512 << 20
)

// kind is what an inode is.
type kind uint8

const (
	regular kind = iota
	folder
	symlink
	charDevice
	blockDevice
	fifo
)

// inode is a file, whatever it is called. Hard links are entries that share one.
type inode struct {
	kind     kind
	mode     uint16 // permissions, setuid, setgid, sticky
	uid, gid uint32
	seconds  int64
	nanos    uint32
	xattrs   map[string]string
	nlink    uint32 // set by finish

	target       string // of a symlink
	major, minor uint32 // of a device
	offset, size int64  // of a regular file's content in the scratch file

	children map[string]*entry // of a folder
	pruned   int               // of a folder: the layer before which nothing in it is from
}

// entry is a name in a folder.
type entry struct {
	inode *inode
	layer int  // that gave it, counted from 1
	alias bool // set by finish: another entry, before it, has the same inode
}

// tree is the file system that layers make, merged in memory: a path leads to
// what it says, and never through a symbolic link.
type tree struct {
	root     *inode
	layer    int // that is being applied, counted from 1
	entries  int
	metadata int
}

func newTree() *tree { return &tree{root: impliedFolder()} }

// impliedFolder is a folder that no layer describes.
func impliedFolder() *inode {
	return &inode{kind: folder, mode: 0o755, children: map[string]*entry{}}
}

// split returns the parts of a path in a layer, which begins at the root
// whether it says so or not. It is refused if it leads out of that.
func split(name string) ([]string, error) {
	if len(name) > maxPath {
		return nil, fmt.Errorf("its path is longer than %d bytes", maxPath)
	}
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		switch part {
		case "", ".":
		case "..":
			if len(parts) == 0 {
				return nil, fmt.Errorf("its path %s leads out of the image", clip(name))
			}
			parts = parts[:len(parts)-1]
		default:
			if len(part) > maxName {
				return nil, fmt.Errorf("a name in its path is longer than %d bytes", maxName)
			}
			if strings.IndexByte(part, 0) >= 0 {
				return nil, fmt.Errorf("its path %s has a zero byte", clip(name))
			}
			parts = append(parts, part)
		}
	}
	if len(parts) > maxDepth {
		return nil, fmt.Errorf("its path is more than %d folders deep", maxDepth)
	}
	return parts, nil
}

// lookup returns what a path leads to; nil: nothing.
func (t *tree) lookup(parts []string) *inode {
	at := t.root
	for _, part := range parts {
		e := at.children[part]
		if e == nil {
			return nil
		}
		at = e.inode
	}
	return at
}

// parent returns the folder that a path is in. What is missing of it is made,
// and what is no folder is replaced by one.
func (t *tree) parent(parts []string) (*inode, error) {
	at := t.root
	for _, part := range parts[:len(parts)-1] {
		e := at.children[part]
		if e == nil || e.inode.kind != folder {
			if err := t.count(len(part)); err != nil {
				return nil, err
			}
			e = &entry{inode: impliedFolder(), layer: t.layer}
			e.inode.pruned = t.layer
			at.children[part] = e
		}
		at = e.inode
	}
	return at, nil
}

// count takes note of a further entry and of what it takes in memory.
func (t *tree) count(bytes int) error {
	if t.entries++; t.entries > maxEntries {
		return fmt.Errorf("%w: it has more than %d files", sandbox.ErrInvalid, maxEntries)
	}
	if t.metadata += bytes; t.metadata > maxMetadata {
		return fmt.Errorf("%w: its paths and attributes take more than %d MiB", sandbox.ErrInvalid, maxMetadata>>20)
	}
	return nil
}

// put gives a path an inode. A folder that is there already stays, with what
// is in it, and takes on what the new one has; all else is replaced.
func (t *tree) put(parts []string, node *inode) error {
	bytes := len(node.target)
	for name, value := range node.xattrs {
		bytes += len(name) + len(value)
	}
	for _, part := range parts {
		bytes += len(part) + 1
	}
	if err := t.count(bytes); err != nil {
		return err
	}
	if len(parts) == 0 {
		if node.kind != folder {
			return fmt.Errorf("%w: the root of an image is a folder", sandbox.ErrInvalid)
		}
		t.root.describe(node)
		return nil
	}
	in, err := t.parent(parts)
	if err != nil {
		return err
	}
	name := parts[len(parts)-1]
	if old := in.children[name]; old != nil && old.inode.kind == folder && node.kind == folder {
		old.layer = t.layer
		old.inode.describe(node)
		return nil
	}
	if node.kind == folder {
		node.children, node.pruned = map[string]*entry{}, t.layer
	}
	in.children[name] = &entry{inode: node, layer: t.layer}
	return nil
}

// describe gives a folder the attributes of another.
func (n *inode) describe(other *inode) {
	n.mode, n.uid, n.gid = other.mode, other.uid, other.gid
	n.seconds, n.nanos, n.xattrs = other.seconds, other.nanos, other.xattrs
}

// link gives a path the inode of another, which is there already.
func (t *tree) link(parts, target []string) error {
	node := t.lookup(target)
	path := "/" + strings.Join(target, "/")
	switch {
	case node == nil:
		return fmt.Errorf("%w: it is a link to %s, which is not there", sandbox.ErrInvalid, clip(path))
	case node.kind == folder:
		return fmt.Errorf("%w: it is a hard link to the folder %s", sandbox.ErrInvalid, clip(path))
	case len(parts) == 0:
		return fmt.Errorf("%w: the root of an image is a folder", sandbox.ErrInvalid)
	}
	bytes := 0
	for _, part := range parts {
		bytes += len(part) + 1
	}
	if err := t.count(bytes); err != nil {
		return err
	}
	in, err := t.parent(parts)
	if err != nil {
		return err
	}
	in.children[parts[len(parts)-1]] = &entry{inode: node, layer: t.layer}
	return nil
}

// hide removes what the layers below have at a path. What the same layer has
// there stays, wherever in the layer it is.
func (t *tree) hide(parts []string) {
	in := t.lookup(parts[:len(parts)-1])
	name := parts[len(parts)-1]
	if in == nil || in.children[name] == nil {
		return
	}
	if t.isHidden(in.children[name]) {
		delete(in.children, name)
	}
}

// hideAll does so with all that is in a folder.
func (t *tree) hideAll(parts []string) {
	if in := t.lookup(parts); in != nil && in.kind == folder {
		t.prune(in)
	}
}

// prune removes from a folder what is of the layers below. It comes to each
// folder once a layer, however often it is asked to.
func (t *tree) prune(in *inode) {
	if in.pruned == t.layer {
		return
	}
	in.pruned = t.layer
	for name, e := range in.children {
		if t.isHidden(e) {
			delete(in.children, name)
		}
	}
}

// isHidden prunes an entry and reports whether nothing of this layer is left
// of it. A folder of the layers below that holds something of this one stays
// as one that no layer describes.
func (t *tree) isHidden(e *entry) bool {
	below := e.layer < t.layer
	if e.inode.kind != folder {
		return below
	}
	t.prune(e.inode)
	if !below {
		return false
	}
	if len(e.inode.children) == 0 {
		return true
	}
	e.layer = t.layer
	e.inode.describe(impliedFolder())
	return false
}

// finish counts the links to each inode, and returns how many inodes there are.
func (t *tree) finish() (inodes uint64) {
	t.root.walk(func(e *entry) {
		if e.alias = e.inode.nlink > 0; !e.alias {
			inodes++
		}
		e.inode.nlink++
	})
	t.root.countFolders()
	return inodes + 1
}

// walk calls visit for each entry below a folder, each before what is in it,
// those of one folder in the order of their names.
func (n *inode) walk(visit func(e *entry)) {
	for _, name := range n.names() {
		e := n.children[name]
		visit(e)
		if e.inode.kind == folder {
			e.inode.walk(visit)
		}
	}
}

// countFolders counts the links that a folder has by itself and by those in it.
func (n *inode) countFolders() {
	n.nlink = 2
	for _, e := range n.children {
		if e.inode.kind == folder {
			n.nlink++
			e.inode.countFolders()
		}
	}
}

// names returns what is in a folder, in order.
func (n *inode) names() []string { return slices.Sorted(maps.Keys(n.children)) }
