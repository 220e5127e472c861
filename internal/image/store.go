// Package image keeps OCI images and makes root file systems of them: one
// read-only EROFS file for each image, cached by the digest of its manifest.
//
// A Store is a folder:
//
//	lock                 held for as long as the index is read or changed
//	oci-layout           an OCI image layout,
//	index.json           its images by name,
//	blobs/sha256/HEX     and its manifests, configurations and layers
//	roots/HEX.erofs      the root file system of the image with that manifest
//	tmp/NAME/            what is being made, locked by the process that makes it
//
// Several processes may use one folder, and each may be killed at any moment:
// what is made gets its name once it is whole and on the disk, and only then
// is it mentioned in the index. What a dead process leaves is removed by Open.
//
// Images come from strangers. Nothing of a layer is ever unpacked into the
// host's file system: layers are merged in memory, with bounds, and the
// result is written as one file. The package runs no image and mounts none.
package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/choiros/agent/internal/sandbox"
)

// DefaultMaxBytes is how much an image may be when it is unpacked.
const DefaultMaxBytes = 64 << 30

// openLimit bounds how long Open waits for others to let go of the lock, which
// they hold for moments only.
const openLimit = time.Minute

// Store is a folder of images. It is safe for concurrent use. Nothing of it
// has to be closed.
type Store struct {
	// Arch is GOARCH of the images that are wanted where there are several;
	// the host's if it is not changed before the first use.
	Arch string
	// MaxBytes bounds what an archive and what the layers of an image may
	// unpack to; DefaultMaxBytes if it is not changed before the first use.
	MaxBytes int64

	dir string

	mu      sync.Mutex
	flights map[string]*flight // conversions under way, by digest
}

// Open opens the store in a folder, which it makes if need be, and removes
// what dead processes have left half-made or unused.
func Open(dir string) (*Store, error) {
	s := &Store{Arch: runtime.GOARCH, MaxBytes: DefaultMaxBytes, dir: dir, flights: map[string]*flight{}}
	if err := s.prepare(); err != nil {
		return nil, fmt.Errorf("open image store %s: %w", dir, diskProblem(err))
	}
	return s, nil
}

func (s *Store) prepare() error {
	for _, dir := range []string{s.dir, s.blobs(), s.roots(), s.temporary()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	if err := os.Chmod(s.dir, 0o700); err != nil {
		return err
	}
	if err := s.removeStale(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), openLimit)
	defer cancel()
	return s.locked(ctx, exclusive, func() error {
		if _, err := os.Stat(s.path("oci-layout")); errors.Is(err, fs.ErrNotExist) {
			if err := s.replaceFile("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
				return err
			}
		}
		records, err := s.records()
		if err != nil {
			return err
		}
		return s.sweep(records)
	})
}

func (s *Store) path(name string) string   { return filepath.Join(s.dir, name) }
func (s *Store) blobs() string             { return filepath.Join(s.dir, "blobs", "sha256") }
func (s *Store) blob(digest string) string { return filepath.Join(s.blobs(), hexOf(digest)) }
func (s *Store) roots() string             { return filepath.Join(s.dir, "roots") }
func (s *Store) root(digest string) string {
	return filepath.Join(s.roots(), hexOf(digest)+rootSuffix)
}
func (s *Store) temporary() string { return filepath.Join(s.dir, "tmp") }

const rootSuffix = ".erofs"

// hexOf is a digest without its algorithm.
func hexOf(digest string) string { return strings.TrimPrefix(digest, "sha256:") }

// The annotation that names an image in an index.
const nameAnnotation = "org.opencontainers.image.ref.name"

// record is an image as the index has it: what it is called.
type record struct {
	manifest v1.Descriptor // without annotations
	names    []string      // none: it can be had by its id alone
}

func (r *record) digest() string { return r.manifest.Digest.String() }

// records reads the index. The caller has the lock.
func (s *Store) records() ([]*record, error) {
	var index v1.IndexManifest
	text, err := os.ReadFile(s.path("index.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &index)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: index.json: %w", sandbox.ErrCorrupt, err)
	}
	var records []*record
	byDigest := map[v1.Hash]*record{}
	for _, d := range index.Manifests {
		name := d.Annotations[nameAnnotation]
		d.Annotations = nil
		r := byDigest[d.Digest]
		if r == nil {
			r = &record{manifest: d}
			byDigest[d.Digest] = r
			records = append(records, r)
		}
		if name != "" {
			r.names = append(r.names, name)
		}
	}
	return records, nil
}

// write replaces the index. The caller has the exclusive lock.
func (s *Store) write(records []*record) error {
	index := v1.IndexManifest{
		SchemaVersion: 2,
		MediaType:     "application/vnd.oci.image.index.v1+json",
		Manifests:     []v1.Descriptor{},
	}
	for _, r := range records {
		if len(r.names) == 0 {
			index.Manifests = append(index.Manifests, r.manifest)
		}
		for _, name := range r.names {
			d := r.manifest
			d.Annotations = map[string]string{nameAnnotation: name}
			index.Manifests = append(index.Manifests, d)
		}
	}
	text, err := json.MarshalIndent(index, "", "  ")
	if err != nil {
		return err
	}
	return s.replaceFile("index.json", append(text, '\n'))
}

// sweep removes the blobs and root file systems of no image. The caller has
// the exclusive lock. What is under way elsewhere is in tmp until it is in the index.
func (s *Store) sweep(records []*record) error {
	used := map[string]bool{}
	for _, r := range records {
		used[r.manifest.Digest.Hex+rootSuffix] = true
		parts, err := s.read(r)
		if errors.Is(err, sandbox.ErrCorrupt) {
			continue // it counts as absent
		}
		if err != nil {
			return err
		}
		used[r.manifest.Digest.Hex] = true
		used[parts.manifest.Config.Digest.Hex] = true
		for _, layer := range parts.manifest.Layers {
			used[layer.Digest.Hex] = true
		}
	}
	for _, dir := range []string{s.blobs(), s.roots()} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, entry := range entries {
			if used[entry.Name()] {
				continue
			}
			if err := os.RemoveAll(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
