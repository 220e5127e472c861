package image

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/choiros/agent/internal/sandbox"
)

// Resolved is what an image says of how it is run.
type Resolved struct {
	Digest string // sha256:<hex> of the manifest
	ID     string // sha256:<hex> of the configuration
	Names  []string

	Architecture string // GOARCH
	Entrypoint   []string
	Cmd          []string
	Env          []string // NAME=value
	User         string   // user or user:group, names or numbers; empty: root
	WorkingDir   string   // empty: /
	StopSignal   string   // empty: SIGTERM
	Volumes      []string // paths, sorted
}

// Other is an architecture whose images can run beside those of the one that is
// wanted, in the same machine.
type Other struct {
	Arch string // GOARCH
	// Missing says, whenever such an image is wanted, why it cannot run at
	// present, and what mends that; nil, the function or what it returns: it can.
	Missing func() error
}

func (o Other) missing() error {
	if o.Missing == nil {
		return nil
	}
	return o.Missing()
}

// ofArch is the one for an architecture, if there is one.
func ofArch(others []Other, arch string) (Other, bool) {
	i := slices.IndexFunc(others, func(o Other) bool { return o.Arch == arch })
	if i < 0 {
		return Other{}, false
	}
	return others[i], true
}

// imageField is what errors call the image of a sandbox.
const imageField = "spec.image"

// Resolve returns the image that a reference means: a name, the id of a
// configuration or the digest of a manifest. If there is none the error wraps
// ErrNotFound, and if it is for another architecture than arch, and than those
// others that are not missing, ErrInvalid. It never pulls.
func (s *Store) Resolve(ctx context.Context, reference, arch string, others ...Other) (resolved Resolved, err error) {
	err = s.locked(ctx, shared, func() error {
		records, err := s.records()
		if err != nil {
			return err
		}
		m, err := s.find(records, reference)
		if err != nil {
			return err
		}
		// Of an image that came in several forms each will do.
		r := m.records[0]
		p, err := s.read(r)
		if err != nil {
			return err
		}
		resolved = resolve(r, p)
		return nil
	})
	switch {
	case err != nil && ctx.Err() != nil:
		return Resolved{}, ctx.Err()
	case err != nil:
		return Resolved{}, fmt.Errorf("image %s: %w", reference, err)
	case resolved.Architecture == arch:
		return resolved, nil
	}
	other, ok := ofArch(others, resolved.Architecture)
	if !ok {
		return Resolved{}, sandbox.Invalidf(imageField, "image %s is for %s and cannot run on %s; load or pull it for linux/%s",
			reference, clipWord(resolved.Architecture), arch, arch)
	}
	if err := other.missing(); err != nil {
		return Resolved{}, sandbox.Invalidf(imageField, "image %s is for linux/%s, and machines here are linux/%s: %v", reference, other.Arch, arch, err)
	}
	return resolved, nil
}

func resolve(r *record, p *parts) Resolved {
	c := p.config.Config
	return Resolved{
		Digest: r.digest(), ID: p.id(), Names: slices.Sorted(slices.Values(r.names)),
		Architecture: goarch(p.config.OS, p.config.Architecture),
		Entrypoint:   c.Entrypoint, Cmd: c.Cmd, Env: c.Env,
		User: c.User, WorkingDir: c.WorkingDir, StopSignal: c.StopSignal,
		Volumes: slices.Sorted(maps.Keys(c.Volumes)),
	}
}

// goarch returns an image's architecture in Go's terms, with the operating
// system before it if that is not Linux.
func goarch(system, arch string) string {
	switch arch {
	case "x86_64", "x86-64":
		arch = "amd64"
	case "aarch64":
		arch = "arm64"
	case "":
		arch = "an unnamed architecture"
	}
	if system != "linux" && system != "" {
		return system + "/" + arch
	}
	return arch
}

func clipWord(text string) string {
	if len(text) > 40 {
		return clip(text)
	}
	return text
}
