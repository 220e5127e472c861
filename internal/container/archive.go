package container

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"
	"regexp"
	"strings"

	"github.com/choiros/agent/internal/sandbox"
)

// Bounds of an image archive, far above what images have.
const (
	maxArchiveEntries = 100_000
	maxDocument       = 4 << 20  // a manifest, an index, a configuration
	maxDocuments      = 64 << 20 // all of them
	maxIndexDepth     = 4
)

// archiveField is what errors call an archive that is sent.
const archiveField = "archive"

// corruptf is an archive that is not what it says it is.
func corruptf(format string, args ...any) error {
	return &sandbox.FieldError{Field: archiveField, Problem: fmt.Sprintf(format, args...), Err: sandbox.ErrCorrupt}
}

// archiveContents is what was seen of an image archive: enough to tell whether
// all of it is there and is what its manifests say. It holds no layers.
type archiveContents struct {
	files map[string]archiveFile
	links map[string]string
	kept  int
}

// archiveFile is one file of an archive.
type archiveFile struct {
	size     int64
	digest   string // sha256:… of the file
	unpacked string // the same of what a gzip file holds; else equal to digest
	document []byte // the content, if it may be JSON that is of interest
}

var blobPattern = regexp.MustCompile(`^blobs/sha256/([0-9a-f]{64})$`)

// verifyArchive reads an OCI or docker archive to its end and returns a
// *sandbox.FieldError unless it is whole.
func verifyArchive(r io.Reader) error {
	tarball, err := plainTar(r)
	if err != nil {
		return err
	}
	contents := archiveContents{files: map[string]archiveFile{}, links: map[string]string{}}
	end := new(tailWriter)
	tarball = io.TeeReader(tarball, end)
	if err := contents.read(tarball); err != nil {
		return err
	}
	// What is behind the end of a tar archive is padding.
	if _, err := io.Copy(io.Discard, tarball); err != nil {
		return readProblem(err)
	}
	if !end.isWhole() {
		return corruptf("is cut short")
	}
	_, docker := contents.files["manifest.json"]
	_, oci := contents.files["index.json"]
	if !docker && !oci {
		return corruptf("is neither an OCI nor a docker archive: it has no index.json and no manifest.json")
	}
	if oci {
		if err := contents.checkOCI(); err != nil {
			return err
		}
	}
	if docker {
		return contents.checkDocker()
	}
	return nil
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
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		unpacked, err := gzip.NewReader(buffered)
		if err != nil {
			return nil, readProblem(err)
		}
		return unpacked, nil
	}
	for prefix, program := range map[string]string{"\xfd7zXZ\x00": "xz", "\x28\xb5\x2f\xfd": "zstd", "BZh": "bzip2"} {
		if bytes.HasPrefix(magic, []byte(prefix)) {
			return nil, sandbox.Unsupportedf(archiveField, "is compressed with %s; send it uncompressed (%s -dc) or with gzip", program, program)
		}
	}
	return buffered, nil
}

// sourceError is an error of whoever sends the archive, and not of the archive.
type sourceError struct{ error }

func (e sourceError) Unwrap() error { return e.error }

// readProblem says what an error means that came up while reading.
func readProblem(err error) error {
	if source, ok := errors.AsType[sourceError](err); ok {
		return source
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return corruptf("is cut short")
	}
	return corruptf("cannot be read: %v", err)
}

// read takes in the files of an archive.
func (c *archiveContents) read(tarball io.Reader) error {
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
			c.links[name] = path.Join(path.Dir(name), header.Linkname)
		case tar.TypeLink:
			c.links[name] = path.Clean(header.Linkname)
		case tar.TypeReg:
			if _, twice := c.files[name]; twice {
				return corruptf("has %s twice", clip(name))
			}
			file, err := c.readFile(name, reader, header.Size)
			if err != nil {
				return err
			}
			c.files[name] = file
			if match := blobPattern.FindStringSubmatch(name); match != nil && file.digest != "sha256:"+match[1] {
				return corruptf("is damaged: %s has another content", name)
			}
		}
	}
}

// readFile takes in one file.
func (c *archiveContents) readFile(name string, r io.Reader, size int64) (archiveFile, error) {
	head := bufio.NewReaderSize(r, 32<<10)
	magic, _ := head.Peek(2) // an error shows again below
	file := archiveFile{size: size}
	digest := sha256.New()
	content := io.TeeReader(head, digest)
	document := len(magic) > 0 && (magic[0] == '{' || magic[0] == '[') && size <= maxDocument
	switch {
	case document:
		if c.kept += int(size); c.kept > maxDocuments {
			return file, corruptf("has more than %d MiB of manifests", maxDocuments>>20)
		}
		text, err := io.ReadAll(content)
		if err != nil {
			return file, readProblem(err)
		}
		file.document = text
	case bytes.Equal(magic, []byte{0x1f, 0x8b}) && !blobPattern.MatchString(name):
		// A docker archive names its layers by what is in them.
		unpacked := sha256.New()
		if err := gunzip(unpacked, content); err != nil {
			return file, err
		}
		file.unpacked = digestOf(unpacked)
	}
	if _, err := io.Copy(io.Discard, content); err != nil {
		return file, readProblem(err)
	}
	file.digest = digestOf(digest)
	if file.unpacked == "" {
		file.unpacked = file.digest
	}
	return file, nil
}

func gunzip(w io.Writer, r io.Reader) error {
	unpacked, err := gzip.NewReader(r)
	if err != nil {
		return readProblem(err)
	}
	if _, err := io.Copy(w, unpacked); err != nil {
		return readProblem(err)
	}
	return nil
}

func digestOf(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

// descriptor is as in the OCI image specification.
type descriptor struct {
	Digest string   `json:"digest"`
	Size   int64    `json:"size"`
	URLs   []string `json:"urls"`
}

// checkOCI sees that every manifest in an OCI layout has its parts.
func (c *archiveContents) checkOCI() error {
	if _, ok := c.files["oci-layout"]; !ok {
		return corruptf("lacks the file oci-layout")
	}
	found, err := c.checkIndex(c.files["index.json"].document, 0)
	if err == nil && found == 0 {
		err = corruptf("has no manifest of those that its index.json names")
	}
	return err
}

// checkIndex returns how many manifests of an index there are. An archive may
// hold but one of many platforms'.
func (c *archiveContents) checkIndex(document []byte, depth int) (found int, err error) {
	var index struct {
		Manifests []descriptor `json:"manifests"`
	}
	if depth > maxIndexDepth {
		return 0, corruptf("has indexes in indexes, %d deep", depth)
	}
	if err := json.Unmarshal(document, &index); err != nil {
		return 0, corruptf("has a malformed index: %v", err)
	}
	for _, d := range index.Manifests {
		file, ok := c.blob(d)
		if !ok {
			continue
		}
		var manifest struct {
			Manifests []descriptor `json:"manifests"`
			Config    *descriptor  `json:"config"`
			Layers    []descriptor `json:"layers"`
		}
		if err := json.Unmarshal(file.document, &manifest); err != nil {
			return 0, corruptf("has a malformed manifest %s: %v", clip(d.Digest), err)
		}
		if manifest.Config == nil {
			deeper, err := c.checkIndex(file.document, depth+1)
			if err != nil {
				return 0, err
			}
			found += deeper
			continue
		}
		for _, part := range append(manifest.Layers, *manifest.Config) {
			if _, ok := c.blob(part); !ok && len(part.URLs) == 0 {
				return 0, corruptf("lacks %s, or a part of it, which manifest %s names", clip(part.Digest), clip(d.Digest))
			}
		}
		found++
	}
	return found, nil
}

// blob returns the file that a descriptor means, if it is there whole. Whether
// its content is right was seen when it was read.
func (c *archiveContents) blob(d descriptor) (archiveFile, bool) {
	file, ok := c.file("blobs/" + strings.Replace(d.Digest, ":", "/", 1))
	return file, ok && file.size == d.Size
}

// file returns a file, following links.
func (c *archiveContents) file(name string) (archiveFile, bool) {
	name = path.Clean(name)
	for range 8 {
		if file, ok := c.files[name]; ok {
			return file, true
		}
		target, ok := c.links[name]
		if !ok {
			break
		}
		name = target
	}
	return archiveFile{}, false
}

// checkDocker sees that the layers of a docker archive are what the images'
// configurations say.
func (c *archiveContents) checkDocker() error {
	var manifests []struct {
		Config string
		Layers []string
	}
	if err := json.Unmarshal(c.files["manifest.json"].document, &manifests); err != nil {
		return corruptf("has a malformed manifest.json: %v", err)
	}
	if len(manifests) == 0 {
		return corruptf("has no image in its manifest.json")
	}
	for _, m := range manifests {
		var config struct {
			RootFS struct {
				DiffIDs []string `json:"diff_ids"`
			} `json:"rootfs"`
		}
		file, ok := c.file(m.Config)
		if !ok {
			return corruptf("lacks %s, which its manifest.json names", clip(m.Config))
		}
		if err := json.Unmarshal(file.document, &config); err != nil {
			return corruptf("has a malformed configuration %s: %v", clip(m.Config), err)
		}
		if len(config.RootFS.DiffIDs) != len(m.Layers) {
			return corruptf("has %d layers for an image of %d", len(m.Layers), len(config.RootFS.DiffIDs))
		}
		for i, name := range m.Layers {
			layer, ok := c.file(name)
			switch {
			case !ok:
				return corruptf("lacks %s, which its manifest.json names", clip(name))
			case blobPattern.MatchString(path.Clean(name)):
				// Its name is its digest, of the compressed layer perhaps.
			case layer.unpacked != config.RootFS.DiffIDs[i]:
				return corruptf("is damaged: %s has another content", clip(name))
			}
		}
	}
	return nil
}

// clip quotes a name that a stranger has given.
func clip(name string) string {
	if len(name) > 100 {
		name = name[:100] + "…"
	}
	return fmt.Sprintf("%q", name)
}

// verifiedBody is a request's body that passes an archive on while it is being
// verified, and has its end only if it is whole.
type verifiedBody struct {
	source  io.Reader
	pipe    *io.PipeWriter
	verdict chan error

	turn   chan struct{} // held by who reads, so that finish can wait
	err    error
	isDone bool
}

func newVerifiedBody(source io.Reader) *verifiedBody {
	reader, writer := io.Pipe()
	b := &verifiedBody{source: source, pipe: writer, verdict: make(chan error, 1), turn: make(chan struct{}, 1)}
	go func() {
		err := verifyArchive(reader)
		// Whatever is sent after that is of no interest.
		reader.CloseWithError(errVerified)
		b.verdict <- err
	}()
	return b
}

var errVerified = errors.New("the archive has been judged")

// Read implements io.Reader for the transport.
func (b *verifiedBody) Read(p []byte) (int, error) {
	b.turn <- struct{}{}
	defer func() { <-b.turn }()
	if b.isDone {
		return 0, b.result()
	}
	n, err := b.source.Read(p)
	if n > 0 {
		if _, failed := b.pipe.Write(p[:n]); failed != nil {
			b.conclude(nil)
			if b.err == nil {
				b.err = failed
			}
			return 0, b.err
		}
	}
	switch {
	case err == nil:
		return n, nil
	case errors.Is(err, io.EOF):
		b.conclude(nil)
	default:
		b.conclude(sourceError{fmt.Errorf("read the archive: %w", err)})
	}
	if b.err != nil {
		return 0, b.err
	}
	return n, io.EOF
}

// conclude ends the verification and keeps the verdict. The caller has the turn.
func (b *verifiedBody) conclude(failed error) {
	if b.isDone {
		return
	}
	b.isDone = true
	b.pipe.CloseWithError(failed)
	verdict := <-b.verdict
	if b.err = failed; failed == nil {
		b.err = verdict
	}
}

func (b *verifiedBody) result() error {
	if b.err != nil {
		return b.err
	}
	return io.EOF
}

// errUnread is a body that Podman did not want to the end.
var errUnread = errors.New("podman did not take the archive whole")

// finish waits until nobody reads the source any more, and returns what was
// wrong with the archive, if anything is known to be.
func (b *verifiedBody) finish() error {
	b.turn <- struct{}{}
	defer func() { <-b.turn }()
	if !b.isDone {
		b.conclude(sourceError{errUnread})
		return nil
	}
	return b.err
}
