package archive

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"syscall"
)

// PackOptions say how to pack.
type PackOptions struct {
	// Follow the path itself if it is a link; links below it are packed as links.
	Follow bool
	// Skipped, if not nil, is told of what is not in the stream, or not as it
	// is on disk, and why: devices, sockets and pipes, what went away or shrank
	// while it was read, and file systems of the kernel's own.
	Skipped func(name, why string)
}

// Pack writes a file, or a folder and all in it, as a tar stream to w. Names
// in the stream begin with name; "." is for the contents of a folder without a
// name of their own.
//
// It reads what is there at the time: a file that changes meanwhile gives a
// valid stream with some of its old and some of its new bytes. The first thing
// that cannot be read ends it with an error that names it; so does ctx. What
// was written until then is no complete archive.
func Pack(ctx context.Context, w io.Writer, file, name string, options PackOptions) error {
	if !filepath.IsLocal(name) {
		return fmt.Errorf("%w: %s cannot begin the names of an archive", ErrRefused, clip(name))
	}
	if options.Follow {
		followed, err := filepath.EvalSymlinks(file)
		if err != nil {
			return err
		}
		file = followed
	}
	out := bufio.NewWriterSize(&stopper{ctx, w}, bufferSize)
	p := &packer{
		ctx: ctx, out: out, tar: tar.NewWriter(out), skipped: options.Skipped,
		links: map[inode]*link{}, buffer: make([]byte, bufferSize),
	}
	if p.skipped == nil {
		p.skipped = func(string, string) {}
	}
	if err := p.top(file, name); err != nil {
		return err
	}
	if err := p.tar.Close(); err != nil {
		return err
	}
	return out.Flush()
}

// packer is one Pack at work.
type packer struct {
	ctx     context.Context //nolint:containedctx // Lives as long as one call of Pack.
	out     *bufio.Writer
	tar     *tar.Writer // to out
	skipped func(name, why string)
	links   map[inode]*link
	buffer  []byte
}

type inode struct{ device, number uint64 }

// link is a file that has further names.
type link struct {
	name string // in the stream
	left uint64 // names not met yet
}

// top packs what the caller has named, which is there and of a kind that can
// be packed, or it is an error.
func (p *packer) top(file, name string) error {
	info, err := os.Lstat(file)
	if err != nil {
		return err
	}
	if info.IsDir() {
		root, err := os.OpenRoot(file)
		if err != nil {
			return err
		}
		defer root.Close()
		return p.folder(root, name, 0)
	}
	if info.Mode().Type()&^fs.ModeSymlink != 0 {
		return fmt.Errorf("%w: %s is no file, folder or link", ErrRefused, file)
	}
	root, err := os.OpenRoot(filepath.Dir(file))
	if err != nil {
		return err
	}
	defer root.Close()
	return p.entry(root, filepath.Base(file), name, 0, inode{})
}

// folder packs a folder with all in it.
func (p *packer) folder(root *os.Root, name string, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%w: %s is deeper than %d folders", ErrRefused, clip(name), maxDepth)
	}
	dir, err := root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	info, err := dir.Stat()
	if err != nil {
		return err
	}
	header, id := describe(info, name+"/")
	header.Typeflag = tar.TypeDir
	if err := p.tar.WriteHeader(header); err != nil {
		return fmt.Errorf("pack %s: %w", clip(name), err)
	}
	for {
		// Not all at once: there may be millions.
		names, err := dir.Readdirnames(readdir)
		for _, base := range names {
			if err := p.entry(root, base, path.Join(name, base), depth+1, id.inode); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// entry packs one file of a folder, parent.
func (p *packer) entry(root *os.Root, base, name string, depth int, parent inode) error {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	info, err := root.Lstat(base)
	if err == nil {
		switch info.Mode().Type() {
		case 0:
			err = p.file(root, base, name, info)
		case fs.ModeDir:
			err = p.subfolder(root, base, name, depth, parent)
		case fs.ModeSymlink:
			err = p.symlink(root, base, name, info)
		default:
			p.skipped(name, "it is a device, a socket or a pipe")
		}
	}
	if errors.Is(err, fs.ErrNotExist) && depth > 0 {
		p.skipped(name, "it went away")
		return nil
	}
	return err
}

func (p *packer) subfolder(root *os.Root, base, name string, depth int, parent inode) error {
	sub, err := root.OpenRoot(base)
	if err != nil {
		return err
	}
	defer sub.Close()
	info, err := sub.Stat(".")
	if err != nil {
		return err
	}
	if _, id := describe(info, name); id.device != parent.device && ofKernel(sub) {
		p.skipped(name, "it is a file system of the kernel's")
		return nil
	}
	return p.folder(sub, name, depth)
}

func (p *packer) symlink(root *os.Root, base, name string, info fs.FileInfo) error {
	target, err := root.Readlink(base)
	if err != nil {
		return err
	}
	header, _ := describe(info, name)
	header.Typeflag, header.Linkname = tar.TypeSymlink, target
	return p.header(header)
}

func (p *packer) header(header *tar.Header) error {
	if err := p.tar.WriteHeader(header); err != nil {
		return fmt.Errorf("pack %s: %w", clip(header.Name), err)
	}
	return nil
}

// file packs a regular file, or a link to a name under which it was packed.
func (p *packer) file(root *os.Root, base, name string, was fs.FileInfo) error {
	// A pipe that has taken the file's place must not hold us up.
	f, err := root.OpenFile(base, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(was, info) {
		p.skipped(name, "it was replaced while it was packed")
		return nil
	}
	header, id := describe(info, name)
	if first := p.linked(id, name); first != "" {
		header.Typeflag, header.Linkname = tar.TypeLink, first
		return p.header(header)
	}
	header.Typeflag, header.Size = tar.TypeReg, info.Size()
	if id.stored < info.Size() {
		extents, err := extents(f, info.Size())
		if err != nil {
			return fmt.Errorf("pack %s: %w", clip(name), err)
		}
		if extents != nil {
			return p.sparse(f, header, extents)
		}
	}
	if err := p.header(header); err != nil {
		return err
	}
	return p.copy(p.tar, f, extent{0, info.Size()}, name)
}

// linked returns the name under which a file was packed before, and otherwise
// remembers that it now is.
func (p *packer) linked(id identity, name string) string {
	if id.links < 2 {
		return ""
	}
	known := p.links[id.inode]
	if known == nil {
		// Without room to remember it, the file is packed twice.
		if len(p.links) < maxLinks {
			p.links[id.inode] = &link{name, id.links - 1}
		}
		return ""
	}
	if known.left--; known.left == 0 {
		delete(p.links, id.inode)
	}
	return known.name
}

// copy writes exactly the bytes of an extent, zeros for those that a file has
// lost meanwhile.
func (p *packer) copy(w io.Writer, f *os.File, e extent, name string) error {
	source := io.NewSectionReader(f, e.offset, e.length)
	for left := e.length; left > 0; {
		n, err := source.Read(p.buffer[:min(left, bufferSize)])
		if errors.Is(err, io.EOF) && n == 0 {
			p.skipped(name, "it shrank while it was packed")
			return p.zeros(w, left)
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("pack %s: %w", clip(name), err)
		}
		if _, err := w.Write(p.buffer[:n]); err != nil {
			return err
		}
		left -= int64(n)
	}
	return nil
}

func (p *packer) zeros(w io.Writer, left int64) error {
	clear(p.buffer)
	for left > 0 {
		n, err := w.Write(p.buffer[:min(left, bufferSize)])
		if err != nil {
			return err
		}
		left -= int64(n)
	}
	return nil
}
