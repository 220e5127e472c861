package drivertest

import (
	"context"
	"errors"
	"testing"

	"github.com/choiros/agent/internal/sandbox"
)

func egressTests() []test {
	return []test{
		{"SetEgressChangesNothingElse", setEgress},
		{"RefusalsOfWhatRuns", refusals},
	}
}

func (b *box) trySetEgress(egress sandbox.Egress) error {
	b.t.Helper()
	return b.do("SetEgress", func(ctx context.Context, d sandbox.Driver) error {
		return d.(sandbox.EgressPolicer).SetEgress(ctx, b.ref, egress)
	})
}

// setEgress looks only at what the contract says of the verb. That policies
// hold is for each driver's own tests.
func setEgress(t *testing.T, s *suite) {
	list := sandbox.Egress{Mode: sandbox.EgressList, DenyPrivate: true, Rules: []sandbox.EgressRule{
		{Name: "*.example.com", Ports: []sandbox.PortRange{{From: 443}, {From: 8000, To: 8999}}, Protocol: sandbox.EgressTCP},
		{CIDR: "192.0.2.0/24"},
	}}
	b := s.box(t)
	if err := b.trySetEgress(list); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("SetEgress of an absent one: %v, want an error that wraps ErrNotFound", err)
	}
	all := func() {
		t.Helper()
		before := b.inspect()
		for _, egress := range []sandbox.Egress{list, list, {Mode: sandbox.EgressDeny}, {Mode: sandbox.EgressAllow}, {}} {
			b.must("SetEgress", b.trySetEgress(egress))
		}
		b.undisturbed(before)
	}
	spec := b.spec("ready-after", "0s", "/data/ready")
	spec.Egress = list
	b.must("Create with a policy", b.tryCreate(spec))
	all()
	b.startSleeper()
	all()
	b.stop(long)
	all()
	b.exited(0)
}

func refusals(t *testing.T, s *suite) {
	type found struct {
		recent []sandbox.Refusal
		total  uint64
	}
	b := s.box(t)
	ask := func() (found, error) {
		t.Helper()
		a := step(t, s, context.WithoutCancel(t.Context()), "EgressRefused", func(ctx context.Context, d sandbox.Driver) (f found, err error) {
			f.recent, f.total, err = d.(sandbox.EgressPolicer).EgressRefused(ctx, b.ref)
			return f, err
		})
		return a.value, a.err
	}
	if _, err := ask(); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("refusals of an absent one: %v, want an error that wraps ErrNotFound", err)
	}
	b.create("ready-after", "0s", "/data/ready")
	if _, err := ask(); !errors.Is(err, sandbox.ErrState) {
		t.Errorf("refusals of a created one: %v, want an error that wraps ErrState", err)
	}
	b.startSleeper()
	f, err := ask()
	b.must("EgressRefused", err)
	var listed uint64
	for i, refusal := range f.recent {
		listed += refusal.Count
		if refusal.Destination == "" || refusal.Count == 0 || refusal.Last.IsZero() || i > 0 && refusal.Last.After(f.recent[i-1].Last) {
			t.Errorf("refusal %d of %+v", i, f.recent)
		}
	}
	if len(f.recent) > 64 || listed > f.total {
		t.Errorf("%d refusals are listed, of %d in all", listed, f.total)
	}
	b.stop(long)
	if _, err := ask(); !errors.Is(err, sandbox.ErrState) {
		t.Errorf("refusals of a stopped one: %v, want an error that wraps ErrState", err)
	}
}
