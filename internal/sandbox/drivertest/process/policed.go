package process

import (
	"context"
	"slices"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/shim"
)

// refusedRecord holds, in a box, what its present life is said to have been
// refused.
const refusedRecord = "refused.json"

// maxRefusals is how many refusals are kept.
const maxRefusals = 64

// Policed is a Driver that is a sandbox.EgressPolicer too. Being a fake, it
// keeps policies and enforces none; what was refused, tests say.
type Policed struct{ *Driver }

var _ sandbox.EgressPolicer = Policed{}

// NewPoliced is New, for a driver that takes policies of egress.
func NewPoliced(cfg Config) Policed {
	d := New(cfg)
	d.policed = true
	return Policed{d}
}

// refused is the record.
type refused struct {
	Recent []sandbox.Refusal
	Total  uint64
}

// Egress returns the policy that is in force for a sandbox.
func (p Policed) Egress(ref sandbox.Ref) (sandbox.Egress, error) {
	b, err := p.boxes().Box(ref.ID)
	if err != nil {
		return sandbox.Egress{}, err
	}
	var m made
	_, err = b.Made(&m)
	return m.Spec.Egress, err
}

// SetEgress implements sandbox.EgressPolicer.
func (p Policed) SetEgress(ctx context.Context, ref sandbox.Ref, egress sandbox.Egress) error {
	return failed("set the egress of", ref, p.mutate(ctx, ref, func(b shim.Box, mutex *shim.Mutex) error {
		var m made
		found, err := b.Made(&m)
		if err != nil {
			return err
		}
		if !found {
			return sandbox.ErrNotFound
		}
		m.Spec.Egress = egress
		return mutex.Remake(m)
	}))
}

// Refuse says that a sandbox that runs was refused something.
func (p Policed) Refuse(ctx context.Context, ref sandbox.Ref, refusal sandbox.Refusal) error {
	return failed("refuse", ref, p.mutate(ctx, ref, func(b shim.Box, _ *shim.Mutex) error {
		var r refused
		if _, err := b.Load(refusedRecord, &r); err != nil {
			return err
		}
		r.Total += refusal.Count
		r.Recent = slices.Insert(r.Recent, 0, refusal)
		r.Recent = r.Recent[:min(len(r.Recent), maxRefusals)]
		return b.Save(refusedRecord, r)
	}))
}

// EgressRefused implements sandbox.EgressPolicer.
func (p Policed) EgressRefused(ctx context.Context, ref sandbox.Ref) (recent []sandbox.Refusal, total uint64, err error) {
	if _, err := p.running(ctx, ref); err != nil {
		return nil, 0, failed("refusals of", ref, err)
	}
	b, err := p.boxes().Box(ref.ID)
	if err != nil {
		return nil, 0, failed("refusals of", ref, err)
	}
	var r refused
	_, err = b.Load(refusedRecord, &r)
	return r.Recent, r.Total, failed("refusals of", ref, err)
}
