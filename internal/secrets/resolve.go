package secrets

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"sync"

	"github.com/choiros/agent/internal/sandbox"
)

// Set is what Resolve found.
type Set struct {
	// Items are in the order of the references, those of one "*" by name.
	Items []Item
	// Missing are the optional references that gave nothing.
	Missing []Missing
}

// Wipe overwrites all values; see Value.Wipe.
func (s Set) Wipe() { wipe(s.Items) }

// Item is a secret to deliver.
type Item struct {
	// Name is the variable's, or the file's.
	Name string
	// Source is the reference's, for people.
	Source string
	// File says that it is delivered as a file and not as a variable.
	File  bool
	Value Value
	// Version changes when the value does and does not tell it: the version's
	// id from AWS, otherwise 12 hex digits of an HMAC under a key of this
	// Resolver's. It cannot be compared with another Resolver's.
	Version string
}

// Missing is an optional secret that gave nothing.
type Missing struct {
	Name, Source string
	// Err says why, for people: it wraps ErrNotFound when there simply is no
	// such secret; anything else deserves somebody's attention.
	Err error
}

// document is a source that was fetched.
type document interface {
	lookup(src source, name string) ([]byte, error)
	// all returns everything that has a name.
	all() (map[string][]byte, error)
	// version is the source's own; empty: it has none.
	version() string
}

// plain is a source that is one value.
type plain []byte

func (p plain) lookup(source, string) ([]byte, error) { return bytes.Clone(p), nil }
func (p plain) all() (map[string][]byte, error)       { return nil, corruptf("has no keys") }
func (p plain) version() string                       { return "" }

// variables are those of an env file.
type variables map[string][]byte

func (v variables) lookup(src source, name string) ([]byte, error) {
	key := name
	if src.key != "" {
		key = src.key
	}
	value, found := v[key]
	if !found {
		return nil, missingf("has no variable %s", key)
	}
	return bytes.Clone(value), nil
}

func (v variables) all() (map[string][]byte, error) { return v, nil }
func (v variables) version() string                 { return "" }

// Resolve reads the secrets of one start. inline holds the values of inline:
// sources; they are not wiped. A source that several references name is
// fetched once.
//
// Optional references that give nothing, for whatever reason, are reported as
// missing. Otherwise the first reference that gives nothing is the error: a
// *sandbox.FieldError that names the secret, its source and the remedy, and
// wraps ErrNotFound, ErrDenied (permissions, and the policy, which binds
// optional ones too), ErrUnavailable (no answer), ErrCorrupt or ErrInvalid.
// If ctx ends first, its error. With an error, the Set is empty.
func (r *Resolver) Resolve(ctx context.Context, refs []sandbox.SecretRef, inline map[string]Value, keyless bool) (Set, error) {
	sources, err := r.parse(refs, keyless, nil)
	if err != nil {
		return Set{}, err
	}
	fetched := r.fetchAll(ctx, sources, inline)
	if err := ctx.Err(); err != nil {
		return Set{}, err
	}
	var found []resolved
	var missing []Missing
	for i, ref := range refs {
		items, err := r.items(ref, sources[i], fetched[sources[i].unit()])
		if err == nil {
			for _, item := range items {
				found = append(found, resolved{i, item})
			}
			continue
		}
		err = refError(i, ref, err)
		if !ref.Optional {
			wipeResolved(found)
			return Set{}, err
		}
		missing = append(missing, Missing{Name: ref.Name, Source: ref.Source, Err: err})
	}
	items, err := r.settle(refs, found, keyless)
	if err != nil {
		wipeResolved(found)
		return Set{}, err
	}
	return Set{Items: items, Missing: missing}, nil
}

// resolved is an item and the reference that it is of.
type resolved struct {
	ref  int
	item Item
}

func wipeResolved(found []resolved) {
	for _, f := range found {
		f.item.Value.Wipe()
	}
}

// settle drops what "*" found under a name that a reference has of its own,
// and refuses what may not be: forbidden names, one name from two "*", and
// too much.
func (r *Resolver) settle(refs []sandbox.SecretRef, found []resolved, keyless bool) ([]Item, error) {
	type place struct {
		name string
		file bool
	}
	named := map[place]bool{}
	for _, ref := range refs {
		named[place{ref.Name, ref.File}] = true
	}
	var items []Item
	taken, total := map[place]bool{}, 0
	for _, f := range found {
		at, expanded := place{f.item.Name, f.item.File}, refs[f.ref].Name == all
		if keyless && r.forbids(f.item.Name) {
			return nil, forbidden(fieldOf(f.ref)+".name", f.item.Name)
		}
		if expanded && named[at] {
			f.item.Value.Wipe()
			continue
		}
		if taken[at] {
			return nil, sandbox.Invalidf(fieldOf(f.ref), "%s has a name that another * source has too: %s", f.item.Source, f.item.Name)
		}
		taken[at] = true
		if total += f.item.Value.Len(); total > maxTotal {
			return nil, sandbox.Invalidf("spec.secrets", "hold more than %d bytes together", maxTotal)
		}
		if items = append(items, f.item); len(items) > maxItems {
			return nil, sandbox.Invalidf("spec.secrets", "are more than %d values", maxItems)
		}
	}
	return items, nil
}

// items are what one reference gives.
func (r *Resolver) items(ref sandbox.SecretRef, src source, got fetched) ([]Item, error) {
	if got.err != nil {
		return nil, got.err
	}
	if ref.Name != all {
		value, err := got.document.lookup(src, ref.Name)
		if err != nil {
			return nil, err
		}
		item, err := r.item(ref, ref.Name, value, got.document.version())
		return []Item{item}, err
	}
	values, err := got.document.all()
	if err != nil {
		return nil, err
	}
	var items []Item
	for _, key := range slices.Sorted(maps.Keys(values)) {
		if err := checkName(key, ref.File); err != nil || key == all {
			wipe(items)
			return nil, corruptf("has the key %.80q, which cannot be a secret's name; name the keys that you need one by one", key)
		}
		item, err := r.item(ref, key, bytes.Clone(values[key]), got.document.version())
		if err != nil {
			wipe(items)
			return nil, err
		}
		items = append(items, item)
	}
	return items, nil
}

func (r *Resolver) item(ref sandbox.SecretRef, name string, value []byte, version string) (Item, error) {
	switch {
	case len(value) > maxValue:
		return Item{}, corruptf("the value of %s is longer than %d bytes", name, maxValue)
	case !ref.File && bytes.IndexByte(value, 0) >= 0:
		return Item{}, corruptf("the value of %s has a NUL byte, which no environment can hold; deliver it as a file", name)
	}
	if version == "" {
		version = r.localVersion(value)
	}
	return Item{Name: name, Source: ref.Source, File: ref.File, Value: NewValue(value), Version: version}, nil
}

// fetched is what became of one source.
type fetched struct {
	document document
	err      error
}

// fetchAll fetches each source once, a few at a time, and returns them by
// their unit.
func (r *Resolver) fetchAll(ctx context.Context, sources []source, inline map[string]Value) map[string]fetched {
	units := map[string]source{}
	for _, src := range sources {
		units[src.unit()] = src
	}
	results := make(map[string]fetched, len(units))
	var mu sync.Mutex // guards results
	var group sync.WaitGroup
	slots := make(chan struct{}, maxAtOnce)
	for unit, src := range units {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			limited, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
			defer cancel()
			got, err := r.fetch(limited, src, inline)
			mu.Lock()
			defer mu.Unlock()
			results[unit] = fetched{got, err}
		})
	}
	group.Wait()
	return results
}

func (r *Resolver) fetch(ctx context.Context, src source, inline map[string]Value) (document, error) {
	if late := ended(ctx); late != nil {
		return nil, late
	}
	switch src.scheme {
	case schemeEnvFile:
		content, err := r.files.read(src.target, private, maxTotal)
		if err != nil {
			return nil, err
		}
		defer clear(content)
		values, err := parseEnvFile(content)
		return variables(values), err
	case schemeFile:
		content, err := r.files.read(src.target, private, maxValue)
		return plain(content), err
	case schemeCredential:
		if r.cfg.CredentialsDir == "" {
			return nil, missingf("systemd gave the agent no credentials: add LoadCredential=%s:… to its unit", src.target)
		}
		content, err := r.files.read(filepath.Join(r.cfg.CredentialsDir, src.target), credential, maxValue)
		return plain(content), err
	case schemeSops:
		return r.fetchSops(ctx, src.target)
	case schemeAge:
		return r.fetchAge(src.target)
	case schemeAWS:
		return r.fetchAWS(ctx, src.target)
	case schemeInline:
		value, found := inline[src.target]
		if !found {
			return nil, missingf("no value was pushed under this name: agentctl secret push")
		}
		return plain(value.Reveal()), nil
	}
	return nil, fmt.Errorf("%w: no such kind of source", sandbox.ErrInvalid)
}

func (r *Resolver) fetchAge(path string) (document, error) {
	// Encryption adds a header and 16 bytes to 64 KiB; armor a third.
	content, err := r.files.read(path, public, 2*maxValue)
	if err != nil {
		return nil, err
	}
	identities, err := r.identities()
	if err != nil {
		return nil, err
	}
	value, err := decryptAge(content, identities, maxValue)
	return plain(value), err
}
