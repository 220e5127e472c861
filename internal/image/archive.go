package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"
	"regexp"
	"strconv"

	"github.com/klauspost/compress/gzip"

	"github.com/choiros/agent/internal/sandbox"
)

// Bounds of an image archive, far above what images have.
const (
	maxArchiveEntries = 100_000
	maxIndexDepth     = 4
	maxLinks          = 8 // from name to name
)

// archiveField is what errors call an archive that is sent.
const archiveField = "archive"

// corruptf is an archive that is not what it says it is.
func corruptf(format string, args ...any) error {
	return &sandbox.FieldError{Field: archiveField, Problem: fmt.Sprintf(format, args...), Err: sandbox.ErrCorrupt}
}

// archive is an image archive that was read to its end.
type archive struct {
	files map[string]file
	links map[string]string
}

// file is one file of an archive, in a stage.
type file struct {
	path     string
	size     int64
	digest   string // sha256:… of the file
	unpacked string // the same of what a gzip file holds; else equal to digest
	head     []byte // how it begins
}

// document returns the content of a file that may be JSON.
func (f file) document() ([]byte, error) {
	if f.size > maxDocument {
		return nil, corruptf("has a document of %d bytes; at most %d are allowed", f.size, maxDocument)
	}
	return readDocument(f.path)
}

var blobPattern = regexp.MustCompile(`^blobs/sha256/([0-9a-f]{64})$`)

// archiveReader reads an archive into a stage.
type archiveReader struct {
	stage   *stage
	archive archive
	left    int64 // how many bytes there may yet be
	written int64 // how many bytes files may yet have: holes take none of an archive
}

// readArchive reads an OCI or docker archive to its end. Its files are in the
// stage then. One that will not do gives a *sandbox.FieldError.
func readArchive(ctx context.Context, st *stage, source io.Reader, limit int64) (*archive, error) {
	unpacked, err := plainTar(sourceReader{ctx, source})
	if err != nil {
		return nil, err
	}
	end := new(tailWriter)
	r := &archiveReader{stage: st, left: limit, written: limit, archive: archive{files: map[string]file{}, links: map[string]string{}}}
	tarball := io.TeeReader(&boundedReader{unpacked, &r.left}, end)
	if err := r.read(tarball); err != nil {
		return nil, err
	}
	// What is behind the end of a tar archive is padding.
	if _, err := io.Copy(io.Discard, tarball); err != nil {
		return nil, readProblem(err)
	}
	if !end.isWhole() {
		return nil, corruptf("is cut short")
	}
	return &r.archive, nil
}

// sourceReader marks the errors of whoever sends an archive, and ends with the context.
type sourceReader struct {
	ctx    context.Context
	source io.Reader
}

func (r sourceReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, sourceError{err}
	}
	n, err := r.source.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = sourceError{fmt.Errorf("read the archive: %w", err)}
	}
	return n, err
}

// sourceError is an error of whoever sends the archive, and not of the archive.
type sourceError struct{ error }

func (e sourceError) Unwrap() error { return e.error }

// errTooLarge is met where an image unpacks to more than is allowed.
var errTooLarge = fmt.Errorf("%w: it unpacks to more than is allowed", sandbox.ErrInvalid)

// boundedReader fails when there is more to read than is left.
type boundedReader struct {
	r    io.Reader
	left *int64
}

func (b *boundedReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if *b.left -= int64(n); *b.left < 0 {
		return 0, errTooLarge
	}
	return n, err
}

// tailWriter keeps the last block of a tar archive. Package tar takes the lack
// of an end for one where it falls between two files.
type tailWriter struct {
	last [512]byte
	n    int64
}

func (w *tailWriter) Write(p []byte) (int, error) {
	w.n += int64(len(p))
	if len(p) >= len(w.last) {
		copy(w.last[:], p[len(p)-len(w.last):])
	} else {
		copy(w.last[:], w.last[len(p):])
		copy(w.last[len(w.last)-len(p):], p)
	}
	return len(p), nil
}

// isWhole reports whether it ends as tar archives do: with a block of zeros.
func (w *tailWriter) isWhole() bool {
	return w.n > 0 && w.n%int64(len(w.last)) == 0 && w.last == [512]byte{}
}

// plainTar undoes the compression of a whole archive.
func plainTar(r io.Reader) (io.Reader, error) {
	buffered := bufio.NewReaderSize(r, 64<<10)
	magic, err := buffered.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, readProblem(err)
	}
	switch {
	case len(magic) == 0:
		return nil, corruptf("is empty")
	case bytes.HasPrefix(magic, gzipMagic):
		unpacked, err := gzip.NewReader(buffered)
		if err != nil {
			return nil, readProblem(err)
		}
		return unpacked, nil
	}
	for prefix, program := range map[string]string{"\xfd7zXZ\x00": "xz", string(zstdMagic): "zstd", "BZh": "bzip2"} {
		if bytes.HasPrefix(magic, []byte(prefix)) {
			return nil, sandbox.Unsupportedf(archiveField, "is compressed with %s; send it uncompressed (%s -dc) or with gzip", program, program)
		}
	}
	return buffered, nil
}

// readProblem says what an error means that came up while reading.
func readProblem(err error) error {
	if source, ok := errors.AsType[sourceError](err); ok {
		return source
	}
	switch {
	case errors.Is(err, errTooLarge):
		return sandbox.Invalidf(archiveField, "unpacks to more than is allowed")
	case errors.Is(diskProblem(err), sandbox.ErrExhausted):
		return diskProblem(err)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return corruptf("is cut short")
	}
	return corruptf("cannot be read: %v", err)
}

// read takes in the files of an archive.
func (r *archiveReader) read(tarball io.Reader) error {
	reader := tar.NewReader(tarball)
	for entries := 0; ; entries++ {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return readProblem(err)
		}
		if entries >= maxArchiveEntries {
			return corruptf("has more than %d files", maxArchiveEntries)
		}
		name := path.Clean(header.Name)
		switch header.Typeflag {
		case tar.TypeSymlink:
			r.archive.links[name] = path.Join(path.Dir(name), header.Linkname)
		case tar.TypeLink:
			r.archive.links[name] = path.Clean(header.Linkname)
		case tar.TypeReg:
			if _, twice := r.archive.files[name]; twice {
				return corruptf("has %s twice", clip(name))
			}
			f, err := r.readFile(name, reader)
			if err != nil {
				return err
			}
			r.archive.files[name] = f
			if match := blobPattern.FindStringSubmatch(name); match != nil && f.digest != "sha256:"+match[1] {
				return corruptf("is damaged: %s has another content", name)
			}
		}
	}
}

// readFile takes in one file.
func (r *archiveReader) readFile(name string, content io.Reader) (file, error) {
	out, err := r.stage.create("file-" + strconv.Itoa(len(r.archive.files)))
	if err != nil {
		return file{}, diskProblem(err)
	}
	defer out.Close()
	f := file{path: out.Name()}
	digest := sha256.New()
	sink := io.MultiWriter(out, digest)
	head := bufio.NewReaderSize(&boundedReader{content, &r.written}, 64<<10)
	magic, _ := head.Peek(len(zstdMagic)) // an error shows again below
	f.head = bytes.Clone(magic)
	if bytes.HasPrefix(magic, gzipMagic) && !blobPattern.MatchString(name) {
		// A docker archive names its layers by what is in them.
		if f.unpacked, err = r.unpackedDigest(io.TeeReader(head, sink)); err != nil {
			return file{}, readProblem(err)
		}
	}
	if _, err := io.Copy(sink, head); err != nil {
		return file{}, readProblem(err)
	}
	info, err := out.Stat()
	if err != nil {
		return file{}, err
	}
	f.size, f.digest = info.Size(), sumOf(digest)
	if f.unpacked == "" {
		f.unpacked = f.digest
	}
	return f, nil
}

// unpackedDigest returns the digest of what a gzip file holds. What it unpacks
// to counts as if it were in the archive.
func (r *archiveReader) unpackedDigest(packed io.Reader) (string, error) {
	unpacked, err := gzip.NewReader(bufio.NewReaderSize(packed, 64<<10))
	if err != nil {
		return "", err
	}
	digest := sha256.New()
	_, err = io.Copy(digest, &boundedReader{unpacked, &r.left})
	return sumOf(digest), err
}

func sumOf(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

// file returns a file, following links.
func (a *archive) file(name string) (file, bool) {
	name = path.Clean(name)
	for range maxLinks {
		if f, ok := a.files[name]; ok {
			return f, true
		}
		target, ok := a.links[name]
		if !ok {
			break
		}
		name = path.Clean(target)
	}
	return file{}, false
}
