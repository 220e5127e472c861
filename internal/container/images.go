package container

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/containers/podman/v5/pkg/bindings"
	"github.com/containers/podman/v5/pkg/bindings/images"
	"github.com/containers/podman/v5/pkg/domain/entities/types"
	distref "github.com/distribution/reference"

	"github.com/choiros/agent/internal/sandbox"
)

// Images implements sandbox.ImageStore.
func (d *Driver) Images(ctx context.Context) ([]sandbox.Image, error) {
	var list []*types.ImageSummary
	err := d.call(ctx, readLimit, func(ctx context.Context) (err error) {
		list, err = images.List(ctx, nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	found := make([]sandbox.Image, 0, len(list))
	for _, summary := range list {
		found = append(found, sandbox.Image{
			ID:        imageID(summary.ID),
			Digest:    summary.Digest,
			Names:     slices.Sorted(slices.Values(summary.RepoTags)),
			SizeBytes: uint64(max(summary.Size, 0)),
			CreatedAt: time.Unix(summary.Created, 0).UTC(),
		})
	}
	slices.SortFunc(found, func(a, b sandbox.Image) int { return strings.Compare(a.ID, b.ID) })
	return found, nil
}

// imageID is an image's id as the world writes it. Podman leaves out the
// algorithm.
func imageID(id string) string { return "sha256:" + strings.TrimPrefix(id, "sha256:") }

// RemoveImage implements sandbox.ImageStore. Of an image that has several names,
// removing one takes away that name only.
func (d *Driver) RemoveImage(ctx context.Context, reference string) error {
	err := d.settle(ctx, removeLimit, func(ctx context.Context) error {
		// The bindings only have the call for several images, which does not
		// say what kind of error it was.
		conn, err := bindings.GetClient(ctx)
		if err != nil {
			return err
		}
		resp, err := conn.DoRequest(ctx, nil, http.MethodDelete, "/images/%s", nil, nil, reference)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		return resp.Process(nil)
	})
	return op("remove image", reference, err)
}

// LoadImage implements sandbox.ImageStore. Podman takes an archive in whole
// before it looks at it; it then adds image by image and layer by layer, and
// does not take back what it added before one that was corrupt. So the archive
// is verified on its way, and if it will not do Podman never gets its end.
func (d *Driver) LoadImage(ctx context.Context, archive io.Reader) ([]sandbox.Image, error) {
	body := newVerifiedBody(archive)
	var report *types.ImageLoadReport
	err := d.call(ctx, imageLimit, func(ctx context.Context) (err error) {
		report, err = images.Load(ctx, body)
		return err
	})
	if problem := body.finish(); problem != nil && ctx.Err() == nil {
		err = problem
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("load image: %w", err)
	}
	return d.imagesNamed(ctx, report.Names)
}

// imagesNamed returns the images that have these names or ids.
func (d *Driver) imagesNamed(ctx context.Context, names []string) ([]sandbox.Image, error) {
	all, err := d.Images(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(image sandbox.Image) bool {
		return !slices.ContainsFunc(names, func(name string) bool {
			return imageID(name) == image.ID || slices.Contains(image.Names, name)
		})
	}), nil
}

// PullImage implements sandbox.ImageStore. Credentials are those of podman login.
func (d *Driver) PullImage(ctx context.Context, reference string, progress func(string)) (sandbox.Image, error) {
	if _, err := distref.ParseNormalizedNamed(strings.TrimPrefix(reference, "docker://")); err != nil {
		return sandbox.Image{}, sandbox.Invalidf("reference", "%s: %v", clip(reference), err)
	}
	lines := &lineWriter{yield: progress}
	var ids []string
	var told error // what went wrong after Podman had begun to answer
	err := d.call(ctx, imageLimit, func(ctx context.Context) (err error) {
		var writer io.Writer = lines
		ids, err = images.Pull(ctx, reference, new(images.PullOptions).WithProgressWriter(writer))
		if err != nil && !isAnswer(err) && !errors.Is(err, io.ErrUnexpectedEOF) {
			err, told = nil, err
		}
		return err
	})
	lines.flush()
	switch {
	case ctx.Err() != nil:
		return sandbox.Image{}, ctx.Err()
	case err == nil && told == nil && len(ids) == 0:
		err = &sandbox.UnavailableError{Err: errors.New("podman ended without a result"), Cure: restartCure}
	case err == nil:
		err = told
	case errors.Is(err, sandbox.ErrInvalid):
		return sandbox.Image{}, sandbox.Invalidf("reference", "%s: %v", reference, err)
	}
	if err != nil {
		return sandbox.Image{}, op("pull image", reference, err)
	}
	found, err := d.imagesNamed(ctx, ids)
	if err != nil {
		return sandbox.Image{}, err
	}
	if len(found) == 0 {
		return sandbox.Image{}, fmt.Errorf("pull image %s: %w: it was removed meanwhile", reference, sandbox.ErrNotFound)
	}
	return found[0], nil
}

// lineWriter passes on what is written to it line by line.
type lineWriter struct {
	yield func(string)
	rest  []byte
}

func (w *lineWriter) Write(p []byte) (int, error) {
	w.rest = append(w.rest, p...)
	for {
		line, rest, found := bytes.Cut(w.rest, []byte("\n"))
		if !found {
			return len(p), nil
		}
		w.rest = rest
		if text := strings.TrimSpace(string(line)); text != "" {
			w.yield(text)
		}
	}
}

// flush passes on a last line without an end.
func (w *lineWriter) flush() {
	if text := strings.TrimSpace(string(w.rest)); text != "" {
		w.yield(text)
	}
	w.rest = nil
}
