package files

import (
	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

// maxChanges is how many changes one message has at most.
const maxChanges = 256

// pending are changes that were not told yet, one for each path.
type pending struct {
	kinds map[string]guestv1.FileChange_Kind
	order []string // of their first changes
	bytes int      // of the paths
	lost  bool
}

func (p *pending) empty() bool { return len(p.order) == 0 && !p.lost }

// full reports whether one more may be too many for a message.
func (p *pending) full() bool { return len(p.order) >= maxChanges || p.bytes >= maxBytes }

// add adds a change to what is known of a path: new and then changed is new,
// and otherwise the last change counts.
func (p *pending) add(path string, kind guestv1.FileChange_Kind) {
	before, known := p.kinds[path]
	if !known {
		p.order = append(p.order, path)
		p.bytes += len(path)
	}
	if before != guestv1.FileChange_KIND_CREATED || kind != guestv1.FileChange_KIND_CHANGED {
		p.kinds[path] = kind
	}
}

// take returns all and forgets it.
func (p *pending) take() *guestv1.FileChanges {
	changes := &guestv1.FileChanges{Lost: p.lost}
	for _, path := range p.order {
		changes.Changes = append(changes.Changes, &guestv1.FileChange{Path: valid(path), Kind: p.kinds[path]})
	}
	clear(p.kinds)
	p.order, p.bytes, p.lost = p.order[:0], 0, false
	return changes
}
