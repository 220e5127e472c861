package manager

import (
	"context"
	"slices"
	"sync"

	"github.com/choiros/agent/internal/exposure"
	"github.com/choiros/agent/internal/sandbox"
)

// Exposure is what was seen in a mounted folder that looks like secrets.
type Exposure struct {
	// Source and Target are the mount's.
	Source, Target string
	exposure.Report
}

func (x Exposure) equal(y Exposure) bool {
	return x.Source == y.Source && x.Target == y.Target && x.Total == y.Total &&
		x.Incomplete == y.Incomplete && slices.Equal(x.Findings, y.Findings)
}

// look begins to look through the folders of mounts. What it returns waits for
// the end of that, a second at most, and is to be called at least once.
func (m *Manager) look(ctx context.Context, mounts []sandbox.Mount) (seen func() []Exposure) {
	all := make([]Exposure, len(mounts))
	var looks sync.WaitGroup
	for i, mount := range mounts {
		if mount.Kind != sandbox.MountDisk {
			looks.Go(func() {
				all[i] = Exposure{mount.Source, mount.Target, m.looker.Look(ctx, mount.Source)}
			})
		}
	}
	return sync.OnceValue(func() []Exposure {
		looks.Wait()
		return slices.DeleteFunc(all, func(x Exposure) bool { return x.Total == 0 && !x.Incomplete })
	})
}

// noteExposures keeps what was seen, for the next publish, and warns of what is
// new in it. It needs the operation lock.
func (m *Manager) noteExposures(e *entry, seen []Exposure) {
	for _, x := range seen {
		if x.Total == 0 || slices.ContainsFunc(e.exposures, x.equal) {
			continue
		}
		files := make([]string, 0, len(x.Findings))
		for _, f := range x.Findings {
			files = append(files, f.Path)
		}
		m.log.Warn("mounted folder shows what looks like secrets", "sandbox", e.name,
			"source", x.Source, "target", x.Target, "files", files, "count", x.Total)
	}
	e.exposures = seen
}

// lookAgain looks through the folders of a sandbox that runs already, and shows
// what it sees. It needs the operation lock, and does not wait.
func (m *Manager) lookAgain(e *entry) {
	seen := m.look(m.life, e.rec.Spec.Mounts)
	m.work.Go(func() {
		if len(seen()) == 0 {
			return
		}
		m.whileOpen(m.life, e, func() {
			m.noteExposures(e, seen())
			m.publish(e, nil)
		})
	})
}
