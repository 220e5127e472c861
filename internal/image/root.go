package image

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/choiros/agent/internal/sandbox"
)

// progressPause is how often a caller of Root is told how far it is.
const progressPause = 200 * time.Millisecond

// flight is a conversion that all who want its result wait for. It ends when
// the last of them has left.
type flight struct {
	callers int // guarded by the store's mu
	cancel  context.CancelFunc
	done    chan struct{}
	err     error // once done

	// How far it is, for progress.
	at, total atomic.Int64
}

// Root returns the path of the root file system of an image, named by the
// digest of its manifest: a read-only EROFS file. It is made if it is not
// there, once for all who ask, in this process or another. The same image
// gives the same bytes.
//
// progress is called from the caller's goroutine, every now and then, with
// numbers of which only the ratio means anything; nil: not at all. If ctx ends
// the conversion goes on for others that wait for it, and else ends too and
// leaves nothing.
//
// If there is no such image the error wraps ErrNotFound; if its layers are not
// what its manifest says, ErrCorrupt; if what is in them cannot be or is more
// than is allowed, ErrInvalid; if the disk is full, ErrExhausted.
func (s *Store) Root(ctx context.Context, digest string, progress func(done, total int64)) (string, error) {
	if !digestPattern.MatchString(digest) {
		return "", fmt.Errorf("root file system: %w: %s is no digest of a manifest", sandbox.ErrInvalid, clip(digest))
	}
	path := s.root(digest)
	isThere, err := exists(path)
	if err == nil && !isThere {
		err = s.fly(ctx, digest, progress)
	}
	if err != nil && ctx.Err() != nil {
		return "", ctx.Err()
	}
	if err != nil {
		return "", fmt.Errorf("root file system of image %s: %w", digest, err)
	}
	return path, nil
}

// fly waits for the conversion of an image, which it begins if there is none.
func (s *Store) fly(ctx context.Context, digest string, progress func(done, total int64)) error {
	f := s.board(ctx, digest)
	tick := time.NewTicker(progressPause)
	defer tick.Stop()
	for {
		select {
		case <-f.done:
			s.leave(digest, f)
			return f.err
		case <-ctx.Done():
			if s.leave(digest, f) {
				<-f.done // nobody else would see to its end
			}
			return ctx.Err()
		case <-tick.C:
			if total := f.total.Load(); progress != nil && total > 0 {
				progress(f.at.Load(), total)
			}
		}
	}
}

// board returns the conversion that is under way, with a caller more.
func (s *Store) board(ctx context.Context, digest string) *flight {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.flights[digest]; f != nil {
		f.callers++
		return f
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	f := &flight{callers: 1, cancel: cancel, done: make(chan struct{})}
	s.flights[digest] = f
	go func() {
		defer close(f.done)
		f.err = diskProblem(s.makeRoot(ctx, digest, f))
	}()
	return f
}

// leave takes a caller off, and reports whether it was the last, who ends the
// conversion. One that is ended is nobody's to join.
func (s *Store) leave(digest string, f *flight) (last bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.callers--; f.callers > 0 {
		return false
	}
	f.cancel()
	if s.flights[digest] == f {
		delete(s.flights, digest)
	}
	return true
}

// makeRoot converts an image, unless another process has while this one waited for it.
func (s *Store) makeRoot(ctx context.Context, digest string, f *flight) (err error) {
	st, err := s.enterStage(ctx, "root-"+hexOf(digest))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.close()) }()
	if isThere, err := exists(s.root(digest)); isThere || err != nil {
		return err
	}
	var p *parts
	err = s.locked(ctx, shared, func() error {
		r, err := s.recordOf(digest)
		if err == nil {
			p, err = s.read(r)
		}
		return err
	})
	if err != nil {
		return err
	}
	out, err := st.create("root")
	if err != nil {
		return err
	}
	defer out.Close()
	content, err := st.create("content")
	if err != nil {
		return err
	}
	defer content.Close()
	if err := s.convert(ctx, digest, p, out, content, f); err != nil {
		if gone := s.locked(ctx, shared, func() error { _, err := s.recordOf(digest); return err }); errors.Is(gone, sandbox.ErrNotFound) {
			return gone // and its layers with it
		}
		return err
	}
	if err := content.Truncate(0); err != nil { // lest it be brought to the disk with the result
		return err
	}
	return s.publishRoot(ctx, digest, out.Name())
}

// convert writes the root file system of an image. The content file is for
// what its layers unpack to.
func (s *Store) convert(ctx context.Context, digest string, p *parts, out, content *os.File, f *flight) error {
	packed := int64(0)
	for _, layer := range p.manifest.Layers {
		packed += layer.Size
	}
	f.total.Store(2 * packed) // to read, and as much again for writing
	t := newTree()
	sink := &scratch{out: bufio.NewWriterSize(struct{ io.Writer }{content}, 1<<20)}
	stream, files := s.MaxBytes, s.MaxBytes
	for i, layer := range p.manifest.Layers {
		err := s.applyLayer(ctx, t, layer, p.config.RootFS.DiffIDs[i], sink, &stream, &files, f)
		if err != nil {
			return fmt.Errorf("layer %d of %d: %w", i+1, len(p.manifest.Layers), err)
		}
	}
	if err := sink.out.Flush(); err != nil {
		return err
	}
	written := int64(0)
	return writeRoot(ctx, out, t, content, digest, func(n int) {
		written += int64(n)
		f.at.Store(packed + int64(float64(packed)*min(1, float64(written)/float64(sink.offset+1))))
	})
}

// applyLayer merges one layer of the store, and sees that it is what it should be.
func (s *Store) applyLayer(ctx context.Context, t *tree, layer v1.Descriptor, diff v1.Hash, sink *scratch, stream, files *int64, f *flight) error {
	blob, err := os.Open(filepath.Join(s.blobs(), layer.Digest.Hex))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: blob %s is missing; remove the image, and load or pull it again", sandbox.ErrCorrupt, layer.Digest)
	}
	if err != nil {
		return err
	}
	defer blob.Close()
	l, err := openLayer(&progressReader{ctx, blob, f}, stream)
	if err != nil {
		return err
	}
	defer l.close()
	err = t.applyTar(l.unpacked, sink, files)
	if err == nil || errors.Is(err, sandbox.ErrInvalid) {
		// What is wrong with a damaged layer is that it is damaged.
		if damage := l.verify(layer.Digest.String(), diff.String()); err == nil || errors.Is(damage, sandbox.ErrCorrupt) {
			return damage
		}
	}
	return err
}

// progressReader reads a blob, tells how far it is, and ends with the context.
type progressReader struct {
	ctx  context.Context
	blob io.Reader
	f    *flight
}

func (r *progressReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.blob.Read(p)
	r.f.at.Add(int64(n))
	return n, err
}
