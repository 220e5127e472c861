package image

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/choiros/agent/internal/sandbox"
)

const (
	// pullLimit bounds how long a registry may take for an image.
	pullLimit = 2 * time.Hour
	// pullsAtOnce is how many blobs of an image are fetched at a time.
	pullsAtOnce = 3
	// referenceField is what errors call the name of an image that is pulled.
	referenceField = "reference"
)

// PullImage is as in sandbox.ImageStore. Credentials are those of docker login
// and podman login. Of an image for several platforms that of linux and Arch is
// fetched, or if there is none that of the first of the others that is not
// missing. If the registry does not have it the error wraps ErrNotFound, if it
// does not let it be fetched ErrDenied, and if it does not answer ErrUnavailable.
func (s *Store) PullImage(ctx context.Context, ref string, progress func(string), others ...Other) (sandbox.Image, error) {
	repository, at, full, err := parseRemote(ref)
	if err != nil {
		return sandbox.Image{}, sandbox.Invalidf(referenceField, "%s: %v", clip(ref), err)
	}
	limited, cancel := context.WithTimeout(ctx, pullLimit)
	defer cancel()
	image, err := s.pull(limited, repository, at, full, progress, others)
	switch {
	case err != nil && ctx.Err() != nil:
		return sandbox.Image{}, ctx.Err()
	case err != nil && limited.Err() != nil:
		err = fmt.Errorf("%w after %v", sandbox.ErrTimeout, pullLimit)
	}
	if err != nil {
		return sandbox.Image{}, fmt.Errorf("pull image %s: %w", full, diskProblem(err))
	}
	return image, nil
}

// parseRemote returns what a reference means to a registry, and its full name.
// Package name would take localhost for a part of Docker Hub, so it is given
// the parts.
func parseRemote(ref string) (repository name.Repository, at name.Reference, full string, err error) {
	if full, err = normalize(strings.TrimPrefix(ref, "docker://")); err != nil {
		return repository, nil, "", err
	}
	named, err := reference.ParseNormalizedNamed(full)
	if err != nil {
		return repository, nil, "", err
	}
	registry, err := name.NewRegistry(reference.Domain(named))
	if err != nil {
		return repository, nil, "", err
	}
	repository = registry.Repo(reference.Path(named))
	switch n := named.(type) {
	case reference.Digested:
		if !digestPattern.MatchString(n.Digest().String()) {
			return repository, nil, "", errors.New("its digest is no sha256")
		}
		at = repository.Digest(n.Digest().String())
	case reference.Tagged:
		at = repository.Tag(n.Tag())
	}
	return repository, at, full, nil
}

func (s *Store) pull(ctx context.Context, repository name.Repository, at name.Reference, full string, progress func(string), others []Other) (_ sandbox.Image, err error) {
	puller, err := remote.NewPuller(remote.WithAuthFromKeychain(authn.DefaultKeychain), remote.WithUserAgent("choiros-agent"))
	if err != nil {
		return sandbox.Image{}, err
	}
	st, err := s.newStage(ctx)
	if err != nil {
		return sandbox.Image{}, err
	}
	defer func() { err = errors.Join(err, st.close()) }()
	p := &pull{store: s, stage: st, puller: puller, repository: repository, progress: progress, others: others}
	progress("Pulling " + full)
	image, err := p.image(ctx, at)
	if err != nil {
		return sandbox.Image{}, err
	}
	image.names = []string{full}
	added, err := s.add(ctx, []found{image})
	if err != nil {
		return sandbox.Image{}, err
	}
	progress("Pulled " + added[0].ID)
	return added[0], nil
}

// pull is an image that is being fetched.
type pull struct {
	store      *Store
	stage      *stage
	puller     *remote.Puller
	repository name.Repository
	progress   func(string)
	others     []Other
}

// image fetches all parts of an image into the stage.
func (p *pull) image(ctx context.Context, at name.Reference) (found, error) {
	manifest, err := p.manifest(ctx, at)
	if err != nil {
		return found{}, err
	}
	d := plain(manifest.Descriptor)
	d.Size = int64(len(manifest.Manifest))
	path := filepath.Join(p.stage.dir, d.Digest.Hex)
	if err := os.WriteFile(path, manifest.Manifest, 0o600); err != nil {
		return found{}, err
	}
	image := found{manifest: d, blobs: map[string]string{d.Digest.String(): path}}
	parsed, err := parseImage(manifest.Manifest, func(config v1.Descriptor) ([]byte, error) {
		path, _, err := p.blob(ctx, config)
		if err != nil {
			return nil, err
		}
		image.blobs[config.Digest.String()] = path
		return readDocument(path)
	})
	if err != nil {
		return found{}, err
	}
	if int64(parsed.size()) > p.store.MaxBytes {
		return found{}, fmt.Errorf("%w: its layers have more than %d bytes", sandbox.ErrInvalid, p.store.MaxBytes)
	}
	return image, p.layers(ctx, parsed.manifest.Layers, image.blobs)
}

// manifest fetches the manifest of an image, of the platform that is wanted if
// there are several.
func (p *pull) manifest(ctx context.Context, at name.Reference) (*remote.Descriptor, error) {
	fetched, err := p.puller.Get(ctx, at)
	if err != nil {
		return nil, registryProblem(err)
	}
	if fetched.MediaType.IsIndex() {
		if fetched, err = p.platform(ctx, fetched); err != nil {
			return nil, err
		}
	}
	if !fetched.MediaType.IsImage() {
		return nil, fmt.Errorf("%w: it is of the type %s", sandbox.ErrUnsupported, clip(string(fetched.MediaType)))
	}
	if len(fetched.Manifest) > maxDocument {
		return nil, fmt.Errorf("%w: its manifest has more than %d bytes", sandbox.ErrInvalid, maxDocument)
	}
	if digestOf(fetched.Manifest) != fetched.Digest.String() {
		return nil, fmt.Errorf("%w: its manifest is not %s", sandbox.ErrCorrupt, fetched.Digest)
	}
	return fetched, nil
}

// platform fetches the one manifest of an index that is wanted.
func (p *pull) platform(ctx context.Context, fetched *remote.Descriptor) (*remote.Descriptor, error) {
	var index v1.IndexManifest
	if len(fetched.Manifest) > maxDocument {
		return nil, fmt.Errorf("%w: its index has more than %d bytes", sandbox.ErrInvalid, maxDocument)
	}
	if err := json.Unmarshal(fetched.Manifest, &index); err != nil {
		return nil, fmt.Errorf("%w: index: %w", sandbox.ErrCorrupt, err)
	}
	linux := map[string]v1.Descriptor{}
	var has []string
	for _, d := range index.Manifests {
		if d.Platform == nil || d.Platform.OS == "unknown" {
			continue
		}
		if _, twice := linux[d.Platform.Architecture]; d.Platform.OS == "linux" && !twice {
			linux[d.Platform.Architecture] = d
		}
		if len(has) < maxXattrs {
			has = append(has, clipWord(d.Platform.OS)+"/"+clipWord(d.Platform.Architecture))
		}
	}
	d, err := p.choose(linux)
	if err != nil {
		return nil, sandbox.Invalidf(referenceField, "the image is there for %s, and %v", strings.Join(has, ", "), err)
	}
	inner, err := p.puller.Get(ctx, p.repository.Digest(d.Digest.String()))
	return inner, registryProblem(err)
}

// choose returns the image that is wanted, of those for linux by architecture.
func (p *pull) choose(linux map[string]v1.Descriptor) (v1.Descriptor, error) {
	if d, ok := linux[p.store.Arch]; ok {
		return d, nil
	}
	problem := fmt.Errorf("not for linux/%s", p.store.Arch)
	for _, other := range p.others {
		d, ok := linux[other.Arch]
		if !ok {
			continue
		}
		missing := other.missing()
		if missing == nil {
			return d, nil
		}
		problem = fmt.Errorf("%w: %w", problem, missing)
	}
	return v1.Descriptor{}, problem
}

// layers fetches layers, several at a time, and notes where they are.
func (p *pull) layers(ctx context.Context, layers []v1.Descriptor, blobs map[string]string) error {
	type result struct {
		layer  v1.Descriptor
		path   string
		isHere bool
		err    error
	}
	wanted := make(chan v1.Descriptor, len(layers))
	count := 0
	for _, layer := range layers {
		if _, twice := blobs[layer.Digest.String()]; !twice {
			blobs[layer.Digest.String()] = ""
			wanted <- layer
			count++
		}
	}
	close(wanted)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan result, count)
	var workers sync.WaitGroup
	defer workers.Wait()
	for range min(pullsAtOnce, count) {
		workers.Go(func() {
			for layer := range wanted {
				path, isHere, err := p.blob(ctx, layer)
				results <- result{layer, path, isHere, err}
			}
		})
	}
	var failed error
	for n := range count {
		r := <-results
		if r.err != nil {
			if failed == nil {
				failed = r.err
			}
			cancel()
			continue
		}
		blobs[r.layer.Digest.String()] = r.path
		verb := "fetched"
		if r.isHere {
			verb = "was here"
		}
		p.progress(fmt.Sprintf("Layer %d of %d %s: %s, %.1f MiB", n+1, count, verb, r.layer.Digest.Hex[:12], float64(r.layer.Size)/(1<<20)))
	}
	return failed
}

// blob brings a blob into the stage: from the store if it is there, or else from the registry.
func (p *pull) blob(ctx context.Context, d v1.Descriptor) (path string, isHere bool, err error) {
	path = filepath.Join(p.stage.dir, d.Digest.Hex)
	if err := os.Link(p.store.blob(d.Digest.String()), path); err == nil {
		if sum, err := sumFile(ctx, path); err == nil && sum == d.Digest.String() {
			return path, true, nil
		}
		if err := os.Remove(path); err != nil {
			return "", false, err
		}
	}
	return path, false, p.fetch(ctx, d, path)
}

// fetch fetches a blob into a file.
func (p *pull) fetch(ctx context.Context, d v1.Descriptor, path string) error {
	layer, err := p.puller.Layer(ctx, p.repository.Digest(d.Digest.String()))
	if err != nil {
		return registryProblem(err)
	}
	body, err := layer.Compressed()
	if err != nil {
		return registryProblem(err)
	}
	defer body.Close()
	out, err := p.stage.create(filepath.Base(path))
	if err != nil {
		return err
	}
	defer out.Close()
	digest := sha256.New()
	// One byte more shows what is too long.
	n, err := io.Copy(io.MultiWriter(out, digest), io.LimitReader(body, d.Size+1))
	switch isRight := sumOf(digest) == d.Digest.String() && n == d.Size; {
	case isRight:
		return nil
	case n >= d.Size:
		return fmt.Errorf("%w: the registry sent something else for blob %s", sandbox.ErrCorrupt, d.Digest)
	case err != nil && errors.Is(diskProblem(err), sandbox.ErrExhausted):
		return err
	case err == nil:
		err = io.ErrUnexpectedEOF
	}
	return registryProblem(fmt.Errorf("blob %s: %w", d.Digest, err))
}

func sumFile(ctx context.Context, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	digest := sha256.New()
	_, err = io.Copy(digest, sourceReader{ctx, f})
	return sumOf(digest), err
}

// registryProblem says what an error of a registry means.
func registryProblem(err error) error {
	if err == nil {
		return nil
	}
	if answer, ok := errors.AsType[*transport.Error](err); ok {
		switch answer.StatusCode {
		case http.StatusNotFound:
			return fmt.Errorf("%w: %w", sandbox.ErrNotFound, err)
		case http.StatusUnauthorized, http.StatusForbidden:
			return fmt.Errorf("%w: %w", sandbox.ErrDenied, err)
		}
	}
	return &sandbox.UnavailableError{Err: err}
}
