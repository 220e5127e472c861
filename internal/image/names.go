package image

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/distribution/reference"

	"github.com/choiros/agent/internal/sandbox"
)

// normalize returns the full name that a reference stands for where it is
// pulled or was given by docker: alpine is docker.io/library/alpine:latest. Of
// one with both a tag and a digest the digest alone counts, as it does for podman.
func normalize(text string) (string, error) {
	named, err := reference.ParseNormalizedNamed(text)
	if err != nil {
		return "", err
	}
	if digested, ok := named.(reference.Digested); ok {
		canonical, err := reference.WithDigest(reference.TrimNamed(named), digested.Digest())
		if err != nil {
			return "", err
		}
		return canonical.String(), nil
	}
	return reference.TagNameOnly(named).String(), nil
}

// normalizeLocal returns the full name that a name in an OCI layout stands
// for: a short one is localhost's, as it is for podman.
func normalizeLocal(text string) (string, error) {
	if isShort(text) {
		text = "localhost/" + text
	}
	return normalize(text)
}

// isShort reports whether a name lacks a registry, by the rule of docker's
// references: its first part is one if it has a dot or a port, or is localhost.
func isShort(text string) bool {
	first, _, found := strings.Cut(text, "/")
	return !found || !strings.ContainsAny(first, ".:") && first != "localhost"
}

// candidates returns the names that a reference may mean, the likeliest first.
func candidates(text string) ([]string, error) {
	full, err := normalize(text)
	if err != nil {
		return nil, err
	}
	if !isShort(text) {
		return []string{full}, nil
	}
	local, err := normalizeLocal(text)
	if err != nil {
		return nil, err
	}
	return []string{local, full}, nil
}

var (
	digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	idPattern     = regexp.MustCompile(`^(?:sha256:)?([0-9a-f]{12,64})$`)
)

// match is what a reference means in a store: all of these are one image
// unless byName is set, in which case there is one of them.
type match struct {
	records []*record
	byName  string // the name it was found by; empty: by its id or digest
}

// find returns what a reference means, which may be a name, the id of a
// configuration, or the digest of a manifest; of the latter two at least 12 digits.
func (s *Store) find(records []*record, text string) (match, error) {
	absent := fmt.Errorf("%w: there is no image %s in the store", sandbox.ErrNotFound, clip(text))
	names, err := candidates(text)
	for _, name := range names {
		for _, r := range records {
			if slices.Contains(r.names, name) {
				return match{[]*record{r}, name}, nil
			}
		}
	}
	id := idPattern.FindStringSubmatch(text)
	if id == nil {
		if err != nil {
			return match{}, sandbox.Invalidf("reference", "%s: %v", clip(text), err)
		}
		return match{}, absent
	}
	found, ids := match{}, map[string]bool{}
	for _, r := range records {
		config, err := s.configID(r)
		if err != nil {
			return match{}, err
		}
		if config != "" && (strings.HasPrefix(hexOf(config), id[1]) || strings.HasPrefix(r.manifest.Digest.Hex, id[1])) {
			found.records = append(found.records, r)
			ids[config] = true
		}
	}
	switch {
	case len(found.records) == 0:
		return match{}, absent
	case len(ids) > 1:
		return match{}, sandbox.Invalidf("reference", "%s is the beginning of several ids; give more of it", clip(text))
	}
	return found, nil
}

// clip quotes a text that a stranger has given.
func clip(text string) string {
	if len(text) > 200 {
		text = text[:200] + "…"
	}
	return fmt.Sprintf("%q", text)
}
