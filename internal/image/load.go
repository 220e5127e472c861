package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/choiros/agent/internal/sandbox"
)

// LoadImage is as in sandbox.ImageStore. A name that another image had moves
// to the one that is loaded. Of an image for several platforms that of Arch is
// kept, or if there is none that of one of the others, missing or not, or else
// any of them.
func (s *Store) LoadImage(ctx context.Context, archive io.Reader, others ...Other) ([]sandbox.Image, error) {
	images, err := s.load(ctx, archive, others)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("load image: %w", diskProblem(err))
	}
	return images, nil
}

func (s *Store) load(ctx context.Context, archive io.Reader, others []Other) (_ []sandbox.Image, err error) {
	st, err := s.newStage(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, st.close()) }()
	contents, err := readArchive(ctx, st, archive, s.MaxBytes)
	if err != nil {
		return nil, err
	}
	archs := []string{s.Arch}
	for _, other := range others {
		archs = append(archs, other.Arch)
	}
	images, err := contents.images(st, archs)
	if err != nil {
		return nil, err
	}
	return s.add(ctx, images)
}

// add takes images into the store, all of them or none, and returns them.
func (s *Store) add(ctx context.Context, images []found) (added []sandbox.Image, err error) {
	blobs := map[string]string{}
	for _, image := range images {
		maps.Copy(blobs, image.blobs)
	}
	for _, path := range blobs {
		if err := syncPath(path); err != nil {
			return nil, err
		}
	}
	err = s.locked(ctx, exclusive, func() error {
		records, err := s.commit(images, blobs)
		if err != nil {
			// What was not added takes no room.
			if before, err1 := s.records(); err1 == nil {
				err = errors.Join(err, s.sweep(before))
			}
			return err
		}
		all, err := s.describe(records)
		added = slices.DeleteFunc(all, func(i sandbox.Image) bool {
			return !slices.ContainsFunc(images, func(f found) bool { return f.manifest.Digest.String() == i.Digest })
		})
		return err
	})
	return added, err
}

// commit moves blobs into the store and then writes images into its index,
// which it returns. The caller has the exclusive lock.
func (s *Store) commit(images []found, blobs map[string]string) ([]*record, error) {
	records, err := s.records()
	if err != nil {
		return nil, err
	}
	for digest, path := range blobs {
		if err := os.Rename(path, s.blob(digest)); err != nil {
			return nil, err
		}
	}
	if err := syncPath(s.blobs()); err != nil {
		return nil, err
	}
	for _, image := range images {
		records = insert(records, image)
	}
	return records, s.write(records)
}

// insert adds an image to the records. Its names are its own alone from then.
func insert(records []*record, image found) []*record {
	var own *record
	for _, r := range records {
		r.names = slices.DeleteFunc(r.names, func(name string) bool { return slices.Contains(image.names, name) })
		if r.manifest.Digest == image.manifest.Digest {
			own = r
		}
	}
	if own == nil {
		own = &record{manifest: image.manifest}
		records = append(records, own)
	}
	own.names = append(own.names, image.names...)
	slices.Sort(own.names)
	own.names = slices.Compact(own.names)
	return records
}

// Images is as in sandbox.ImageStore. SizeBytes is what the parts of an image
// take in the store, without its root file system. An image that is damaged is left out.
func (s *Store) Images(ctx context.Context) (images []sandbox.Image, err error) {
	err = s.locked(ctx, shared, func() error {
		records, err := s.records()
		if err == nil {
			images, err = s.describe(records)
		}
		return err
	})
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("list images: %w", err)
	}
	return images, nil
}

// describe returns what records are of, sorted by id. The caller has the lock.
func (s *Store) describe(records []*record) ([]sandbox.Image, error) {
	images := make([]sandbox.Image, 0, len(records))
	for _, r := range records {
		p, err := s.read(r)
		if errors.Is(err, sandbox.ErrCorrupt) {
			continue
		}
		if err != nil {
			return nil, err
		}
		images = append(images, sandbox.Image{
			ID: p.id(), Digest: r.digest(), Names: slices.Sorted(slices.Values(r.names)),
			SizeBytes: p.size(), CreatedAt: p.config.Created.UTC(),
		})
	}
	slices.SortFunc(images, func(a, b sandbox.Image) int {
		return cmp.Or(strings.Compare(a.ID, b.ID), strings.Compare(a.Digest, b.Digest))
	})
	return images, nil
}

// RemoveImage is as in sandbox.ImageStore, but for knowing what is in use: that
// inUse says of the digest of a manifest. It is asked while the store is
// locked: who is to use an image says so where inUse looks before calling
// Resolve or Root, which then fail if it is gone. Of an image that has several
// names removing one takes away that name only, and removing it by its id is
// not possible, as with podman. What is open stays readable to who has it open.
func (s *Store) RemoveImage(ctx context.Context, reference string, inUse func(digest string) bool) error {
	err := s.locked(ctx, exclusive, func() error {
		records, err := s.records()
		if err != nil {
			return err
		}
		m, err := s.find(records, reference)
		if err != nil {
			return err
		}
		return s.remove(records, m, inUse)
	})
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("remove image %s: %w", reference, diskProblem(err))
	}
	return nil
}

func (s *Store) remove(records []*record, m match, inUse func(digest string) bool) error {
	var names []string
	for _, r := range m.records {
		names = append(names, r.names...)
	}
	if m.byName != "" && len(names) > 1 {
		r := m.records[0]
		r.names = slices.DeleteFunc(r.names, func(name string) bool { return name == m.byName })
		return s.write(records)
	}
	if len(names) > 1 {
		return fmt.Errorf("%w: it has several names; remove them: %s", sandbox.ErrState, strings.Join(names, ", "))
	}
	for _, r := range m.records {
		if inUse(r.digest()) {
			return fmt.Errorf("%w: it is in use", sandbox.ErrState)
		}
	}
	records = slices.DeleteFunc(records, func(r *record) bool { return slices.Contains(m.records, r) })
	if err := s.write(records); err != nil {
		return err
	}
	return s.sweep(records)
}

// publishRoot gives a finished root file system its name, unless the image was
// removed meanwhile.
func (s *Store) publishRoot(ctx context.Context, digest, temporary string) error {
	if err := syncPath(temporary); err != nil {
		return err
	}
	return s.locked(ctx, exclusive, func() error {
		if _, err := s.recordOf(digest); err != nil {
			return err
		}
		return publish(temporary, s.root(digest))
	})
}

// recordOf returns the image of a manifest. The caller has the lock.
func (s *Store) recordOf(digest string) (*record, error) {
	records, err := s.records()
	if err != nil {
		return nil, err
	}
	for _, r := range records {
		if r.digest() == digest {
			return r, nil
		}
	}
	return nil, fmt.Errorf("%w: there is no image %s in the store", sandbox.ErrNotFound, clip(digest))
}

// exists reports whether there is a file of that name.
func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
