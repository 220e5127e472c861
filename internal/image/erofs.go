package image

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/erofs/go-erofs"

	"github.com/choiros/agent/internal/sandbox"
)

// blockSize is that of the file systems that are written: the page size that
// every Linux can read.
const blockSize = 4096

// maxSmall bounds the bytes in files that are smaller than a block: go-erofs
// keeps those in memory until it writes them between the inodes.
const maxSmall = 1 << 30

// writeRoot writes a tree as an EROFS file system. The same tree and digest
// give the same bytes. wrote is told of what is written as it goes.
func writeRoot(ctx context.Context, out *os.File, t *tree, content io.ReaderAt, digest string, wrote func(n int)) error {
	inodes := t.finish()
	if err := t.checkSmall(); err != nil {
		return err
	}
	w := &rootWriter{ctx: ctx, file: out, buffered: bufio.NewWriterSize(out, 1<<20), wrote: wrote}
	// The time is that of inodes that need no other: it makes them smaller.
	image := erofs.Create(w, erofs.WithBuildTime(0, 0), erofs.WithBlockSize(blockSize))
	if err := image.CopyFrom(&view{t.root, content}); err != nil {
		return err
	}
	if err := image.Close(); err != nil {
		return err
	}
	if err := w.buffered.Flush(); err != nil {
		return err
	}
	return relink(out, t, inodes, digest)
}

func (t *tree) checkSmall() error {
	var sum int64
	t.root.walk(func(e *entry) {
		if e.inode.size < blockSize && !e.alias {
			sum += e.inode.size
		}
	})
	if sum > maxSmall {
		return fmt.Errorf("%w: files smaller than %d bytes take more than %d MiB", sandbox.ErrInvalid, blockSize, maxSmall>>20)
	}
	return nil
}

// rootWriter is what go-erofs writes to.
type rootWriter struct {
	ctx      context.Context
	file     *os.File
	buffered *bufio.Writer
	wrote    func(n int)
}

func (w *rootWriter) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := w.buffered.Write(p)
	w.wrote(n)
	return n, err
}

func (w *rootWriter) Seek(offset int64, whence int) (int64, error) {
	if err := w.buffered.Flush(); err != nil {
		return 0, err
	}
	return w.file.Seek(offset, whence)
}

// Where things are in a superblock, which is at superOffset, in an inode, and
// in an entry of a folder; see struct erofs_super_block, erofs_inode_compact and
// erofs_dirent in the kernel's erofs_fs.h. All numbers are little-endian.
const (
	superOffset     = 1024
	superSize       = 128
	superInodes     = 16 // 8 bytes
	superMetaBlock  = 40 // 4 bytes
	superRoot       = 14 // 2 bytes
	superUUID       = 48 // 16 bytes
	inodeUnit       = 32 // an inode's number counts these
	inodeExtended   = 64 // bytes of the longer form
	inodeFormat     = 0  // 2 bytes: bit 0 says extended, bits 1 to 3 the layout
	inodeXattrs     = 2  // 2 bytes
	inodeSize       = 8  // 4 bytes, or 8 if extended
	inodeBlock      = 16 // 4 bytes
	layoutPlain     = 0
	layoutInline    = 2
	xattrHeaderSize = 12
	direntSize      = 12
	direntName      = 8 // 2 bytes
)

// relink completes a file system that go-erofs has written. That cannot write
// hard links: so only the first name of an inode got it, and the others an
// empty one, which stays behind unused when they are pointed to the first
// here. And it leaves the file system without an id, which gets one of its
// digest's. The caller has seen to the tree's being what was written.
func relink(image *os.File, t *tree, inodes uint64, digest string) error {
	super := make([]byte, superSize)
	if _, err := image.ReadAt(super, superOffset); err != nil {
		return err
	}
	binary.LittleEndian.PutUint64(super[superInodes:], inodes)
	id, err := uuidOf(digest)
	if err != nil {
		return err
	}
	copy(super[superUUID:], id[:])
	if _, err := image.WriteAt(super, superOffset); err != nil {
		return err
	}
	l := &linker{
		image: image, numbers: map[*inode]uint64{},
		inodes: int64(binary.LittleEndian.Uint32(super[superMetaBlock:])) * blockSize,
	}
	return l.folder(t.root, uint64(binary.LittleEndian.Uint16(super[superRoot:])))
}

// uuidOf makes a UUID of a digest: of version 8, whose content is anybody's,
// see RFC 9562.
func uuidOf(digest string) (id [16]byte, err error) {
	sum, err := hex.DecodeString(hexOf(digest))
	if err != nil {
		return id, err
	}
	copy(id[:], sum)
	id[6] = id[6]&0x0f | 0x80
	id[8] = id[8]&0x3f | 0x80
	return id, nil
}

// linker points further names of an inode to it.
type linker struct {
	image   *os.File
	inodes  int64 // where they begin
	numbers map[*inode]uint64
}

// folder does so for a folder, whose inode has this number, and all below.
func (l *linker) folder(in *inode, number uint64) error {
	data, start, err := l.read(number)
	if err != nil {
		return err
	}
	left := len(in.children)
	err = eachDirent(data, func(offset int, name string) error {
		e := in.children[name]
		if e == nil { // itself and its parent
			return nil
		}
		left--
		own := binary.LittleEndian.Uint64(data[offset:])
		switch {
		case e.alias:
			binary.LittleEndian.PutUint64(data[offset:], l.numbers[e.inode])
			_, err := l.image.WriteAt(data[offset:offset+8], start+int64(offset))
			return err
		case e.inode.kind == folder:
			return l.folder(e.inode, own)
		case e.inode.nlink > 1:
			l.numbers[e.inode] = own
		}
		return nil
	})
	if err == nil && left != 0 {
		err = errors.New("the file system that was written lacks some of its files")
	}
	return err
}

// read returns the content of a folder and where in the image it is.
func (l *linker) read(number uint64) (data []byte, start int64, err error) {
	at := l.inodes + int64(number)*inodeUnit
	node := make([]byte, inodeExtended)
	if _, err := l.image.ReadAt(node, at); err != nil && !errors.Is(err, io.EOF) {
		return nil, 0, err
	}
	format := binary.LittleEndian.Uint16(node[inodeFormat:])
	size := int64(binary.LittleEndian.Uint32(node[inodeSize:]))
	switch layout := format >> 1 & 7; layout {
	case layoutPlain:
		start = int64(binary.LittleEndian.Uint32(node[inodeBlock:])) * blockSize
	case layoutInline:
		start = at + inodeUnit
		if format&1 != 0 {
			start = at + inodeExtended
		}
		if n := int64(binary.LittleEndian.Uint16(node[inodeXattrs:])); n > 0 {
			start += xattrHeaderSize + (n-1)*4
		}
	default:
		return nil, 0, fmt.Errorf("a folder was written with the layout %d", layout)
	}
	data = make([]byte, size)
	_, err = l.image.ReadAt(data, start)
	return data, start, err
}

// eachDirent calls visit for each entry of a folder's content, with where it
// is in there. Each block has its entries first and then their names.
func eachDirent(data []byte, visit func(offset int, name string) error) error {
	for at := 0; at < len(data); at += blockSize {
		block := data[at:min(at+blockSize, len(data))]
		if len(block) < direntSize {
			return errors.New("a folder was written that is cut short")
		}
		end := int(binary.LittleEndian.Uint16(block[direntName:]))
		for e := 0; e+direntSize <= end; e += direntSize {
			from, to := int(binary.LittleEndian.Uint16(block[e+direntName:])), len(block)
			if next := e + direntSize; next < end {
				to = int(binary.LittleEndian.Uint16(block[next+direntName:]))
			}
			if from > to || to > len(block) {
				return errors.New("a folder was written whose names cannot be read")
			}
			// The last one may be padded.
			name := string(bytes.TrimRight(block[from:to], "\x00"))
			if err := visit(at+e, name); err != nil {
				return err
			}
		}
	}
	return nil
}
