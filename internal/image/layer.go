package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/choiros/agent/internal/sandbox"
)

// The names of whiteouts, as the OCI image specification (layer.md) has them.
// Others that begin like whiteoutMeta are aufs's own, and no files.
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// maxWindow bounds the memory of a decompressor: the largest window that
// decoders should have, see RFC 8878, 3.1.1.1.2.
const maxWindow = 128 << 20

// scratch takes the content of files, one after the other.
type scratch struct {
	out    *bufio.Writer
	offset int64
}

// take copies a file's content and returns where it is.
func (s *scratch) take(content io.Reader) (offset, size int64, err error) {
	offset = s.offset
	size, err = io.Copy(s.out, content)
	s.offset += size
	return offset, size, err
}

// applyTar merges a layer, a tar archive, onto those below. left is how much
// the files of all layers may yet have.
func (t *tree) applyTar(layer io.Reader, content *scratch, left *int64) error {
	t.layer++
	reader := tar.NewReader(layer)
	for {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return layerProblem(err)
		}
		if err := t.apply(header, &boundedReader{reader, left}, content); err != nil {
			return fmt.Errorf("entry %s: %w", clip(header.Name), err)
		}
	}
}

// layerProblem says what an error of package tar or of a decompressor means.
func layerProblem(err error) error {
	switch {
	case errors.Is(err, errTooLarge), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded),
		errors.Is(diskProblem(err), sandbox.ErrExhausted), errors.Is(err, sandbox.ErrCorrupt):
		return diskProblem(err)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return fmt.Errorf("%w: it is cut short", sandbox.ErrCorrupt)
	}
	return fmt.Errorf("%w: %w", sandbox.ErrCorrupt, err)
}

// invalid makes an error that is about an entry one that wraps ErrInvalid.
func invalid(err error) error { return fmt.Errorf("%w: %w", sandbox.ErrInvalid, err) }

// apply merges one entry of a layer.
func (t *tree) apply(header *tar.Header, body io.Reader, content *scratch) error {
	if header.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	parts, err := split(header.Name)
	if err != nil {
		return invalid(err)
	}
	isWhiteout, err := t.applyWhiteout(parts)
	if isWhiteout || err != nil {
		return err
	}
	if header.Typeflag == tar.TypeLink {
		target, err := split(header.Linkname)
		if err != nil {
			return invalid(fmt.Errorf("of what it links to: %w", err))
		}
		return t.link(parts, target)
	}
	node, err := newInode(header)
	if err != nil {
		return invalid(err)
	}
	if node.kind == regular {
		if node.offset, node.size, err = content.take(body); err != nil {
			return layerProblem(err)
		}
	}
	return t.put(parts, node)
}

// applyWhiteout hides what a whiteout names, and reports whether it was one.
func (t *tree) applyWhiteout(parts []string) (bool, error) {
	for i, part := range parts {
		if !strings.HasPrefix(part, whiteoutPrefix) {
			continue
		}
		isLast := i == len(parts)-1
		hidden := strings.TrimPrefix(part, whiteoutPrefix)
		switch {
		case part == whiteoutOpaque && isLast:
			t.hideAll(parts[:i])
		case strings.HasPrefix(part, whiteoutMeta):
		case !isLast:
			return true, invalid(errors.New("it is in a whiteout"))
		case hidden == "" || hidden == "." || hidden == "..":
			return true, invalid(errors.New("it is a whiteout of nothing that can be"))
		default:
			t.hide(append(parts[:i:i], hidden))
		}
		return true, nil
	}
	return false, nil
}

// newInode returns what an entry describes.
func newInode(header *tar.Header) (*inode, error) {
	const maxID = math.MaxUint32 - 1 // the last is nobody's, see chown(2)
	if header.Uid < 0 || header.Uid > maxID || header.Gid < 0 || header.Gid > maxID {
		return nil, fmt.Errorf("its owner %d:%d is none that can be", header.Uid, header.Gid)
	}
	node := &inode{
		mode: uint16(header.Mode & 0o7777), uid: uint32(header.Uid), gid: uint32(header.Gid),
		seconds: header.ModTime.Unix(), nanos: uint32(header.ModTime.Nanosecond()),
	}
	switch header.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
	case tar.TypeDir:
		node.kind = folder
	case tar.TypeSymlink:
		node.kind, node.mode, node.target = symlink, 0o777, header.Linkname
		if node.target == "" || len(node.target) > maxTarget || strings.IndexByte(node.target, 0) >= 0 {
			return nil, fmt.Errorf("it is a symbolic link to %s", clip(node.target))
		}
	case tar.TypeChar, tar.TypeBlock:
		node.kind = charDevice
		if header.Typeflag == tar.TypeBlock {
			node.kind = blockDevice
		}
		// As wide as Linux has them, see makedev(3) and the kernel's kdev_t.h.
		if header.Devmajor < 0 || header.Devmajor >= 1<<12 || header.Devminor < 0 || header.Devminor >= 1<<20 {
			return nil, fmt.Errorf("its device %d:%d is none that can be", header.Devmajor, header.Devminor)
		}
		node.major, node.minor = uint32(header.Devmajor), uint32(header.Devminor)
	case tar.TypeFifo:
		node.kind = fifo
	default:
		return nil, fmt.Errorf("it is of the unknown type %q", header.Typeflag)
	}
	var err error
	node.xattrs, err = xattrsOf(header)
	return node, err
}

// xattrsOf returns the extended attributes of an entry: those of a kind that
// EROFS can hold. overlayfs's own are left out: they would mean something to
// the overlay that lies over an image in a guest.
func xattrsOf(header *tar.Header) (map[string]string, error) {
	const record = "SCHILY.xattr."
	var xattrs map[string]string
	sum := 0
	for key, value := range header.PAXRecords {
		name, ok := strings.CutPrefix(key, record)
		if !ok || !isXattr(name) || strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			continue
		}
		sum += len(name) + len(value)
		if len(name) > maxName || len(value) > maxXattr || sum > maxXattrSum || len(xattrs) >= maxXattrs {
			return nil, errors.New("it has too many or too long extended attributes")
		}
		if xattrs == nil {
			xattrs = map[string]string{}
		}
		xattrs[name] = value
	}
	return xattrs, nil
}

// The attributes that hold an access control list, see acl(5).
const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
)

// isXattr reports whether EROFS can hold an attribute of that name, see the
// kernel's erofs_fs.h.
func isXattr(name string) bool {
	if name == aclAccess || name == aclDefault {
		return true
	}
	for _, space := range []string{"user.", "trusted.", "security."} {
		if rest, ok := strings.CutPrefix(name, space); ok && rest != "" {
			return true
		}
	}
	return false
}

// layerReader reads a layer as it is in the store, and unpacks it. Once it was
// read to its end, both digests are known.
type layerReader struct {
	packed   *bufio.Reader
	blob     hash.Hash
	unpacked io.Reader
	diff     hash.Hash
	ahead    *ahead
	decoder  *zstd.Decoder // nil: none
}

// openLayer returns a reader of a layer that may unpack to as much as is left.
// It must be closed; until then the blob and what is left are its own.
func openLayer(blob io.Reader, left *int64) (*layerReader, error) {
	l := &layerReader{blob: sha256.New(), diff: sha256.New()}
	l.packed = bufio.NewReaderSize(io.TeeReader(blob, l.blob), 256<<10)
	magic, err := l.packed.Peek(len(zstdMagic))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	var plain io.Reader = l.packed
	switch {
	case bytes.HasPrefix(magic, gzipMagic):
		unzipped, err := gzip.NewReader(l.packed)
		if err != nil {
			return nil, layerProblem(err)
		}
		plain = unzipped
	case bytes.HasPrefix(magic, zstdMagic):
		unpacked, err := zstd.NewReader(l.packed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, layerProblem(err)
		}
		plain, l.decoder = unpacked, unpacked
	}
	l.ahead = readAhead(&boundedReader{plain, left})
	l.unpacked = io.TeeReader(l.ahead, l.diff)
	return l, nil
}

// close ends the reading.
func (l *layerReader) close() {
	l.ahead.close()
	if l.decoder != nil {
		l.decoder.Close()
	}
}

// verify reads what is left of the layer and sees that it was what it should be.
func (l *layerReader) verify(blob, diff string) error {
	if _, err := io.Copy(io.Discard, l.unpacked); err != nil {
		return layerProblem(err)
	}
	if _, err := io.Copy(io.Discard, l.packed); err != nil {
		return layerProblem(err)
	}
	if sumOf(l.blob) != blob || sumOf(l.diff) != diff {
		return fmt.Errorf("%w: it has another content", sandbox.ErrCorrupt)
	}
	return nil
}
