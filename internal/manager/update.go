package manager

import (
	"context"
	"maps"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

// UpdateRequest changes what is not nil.
type UpdateRequest struct {
	Name   string
	Labels *map[string]string
	Idle   *sandbox.IdlePolicy
	// Egress holds at once if the sandbox runs.
	Egress *sandbox.Egress
}

// Update changes labels and policies, whatever state the sandbox is in.
func (m *Manager) Update(ctx context.Context, req UpdateRequest) (*Sandbox, error) {
	e, err := m.find(req.Name)
	if err != nil {
		return nil, err
	}
	if req.Labels != nil {
		if err := sandbox.ValidateLabels("labels", *req.Labels); err != nil {
			return nil, err
		}
	}
	spec, err := m.checkUpdate(e.view().Spec, req)
	if err != nil {
		return nil, err
	}
	err = m.detach(ctx, func(ctx context.Context) error {
		if err := e.lock(ctx); err != nil {
			return err
		}
		defer e.unlock()
		m.step("update:intent")
		err := m.put(e, func(rec *store.Record) {
			rec.Spec = rec.Spec.Clone()
			if req.Labels != nil {
				rec.Labels = maps.Clone(*req.Labels)
			}
			if req.Idle != nil {
				rec.Spec.Idle = spec.Idle
			}
			if req.Egress != nil {
				rec.Spec.Egress, rec.EgressDue = spec.Egress, true
			}
			rec.UpdatedAt = time.Now()
		}, nil)
		if err != nil || req.Egress == nil {
			return err
		}
		return m.setEgress(ctx, e)
	})
	if err != nil {
		return nil, err
	}
	return e.view(), nil
}

// checkUpdate returns a spec with what a request changes of it.
func (m *Manager) checkUpdate(spec sandbox.Spec, req UpdateRequest) (sandbox.Spec, error) {
	spec = spec.Clone()
	if req.Idle == nil && req.Egress == nil {
		return spec, nil
	}
	if req.Idle != nil {
		spec.Idle = *req.Idle
	}
	if req.Egress != nil {
		spec.Egress = req.Egress.Clone()
	}
	if err := spec.Validate(); err != nil {
		return spec, err
	}
	drv, err := m.driver(spec.Driver)
	if err != nil {
		return spec, err
	}
	if err := m.checkIdle(spec); err != nil {
		return spec, err
	}
	if req.Egress == nil {
		return spec, nil
	}
	return spec, checkEgress(drv, spec)
}
