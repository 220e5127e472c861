package drivertest

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/choiros/agent/internal/sandbox"
)

func validatorTests() []test {
	return []test{
		{"ValidateAcceptsWhatRuns", validateAccepts},
		{"ValidateNamesTheField", validateNamesTheField},
		{"CreateOfInvalidLeavesNothing", createOfInvalid},
	}
}

func (s *suite) validate(t *testing.T, spec sandbox.Spec) error {
	t.Helper()
	return s.do(t, t.Context(), "Validate", func(ctx context.Context, d sandbox.Driver) error {
		return d.(sandbox.Validator).Validate(ctx, spec)
	})
}

func validateAccepts(t *testing.T, s *suite) {
	for _, args := range [][]string{{"sleep"}, {"exit", "1"}} {
		if err := s.validate(t, s.Spec(t, Workload{Args: args})); err != nil {
			t.Errorf("Validate refuses what the harness runs: %v", err)
		}
	}
}

// invalid returns specs that no driver can accept, by the field at fault.
func (s *suite) invalid(t *testing.T) map[string]sandbox.Spec {
	t.Helper()
	unknown := s.Spec(t, Workload{Args: []string{"sleep"}})
	unknown.DriverOptions = json.RawMessage(`{"no_driver_has_this_option": true}`)
	array := s.Spec(t, Workload{Args: []string{"sleep"}})
	array.DriverOptions = json.RawMessage(`[]`)
	missing := s.Spec(t, Workload{Args: []string{"sleep"}})
	field := "spec.image"
	if missing.Image != "" {
		missing.Image = "localhost/no-such-image:of-drivertest"
	} else {
		missing.Machine, field = "no-such-machine-of-drivertest", "spec.machine"
	}
	return map[string]sandbox.Spec{
		"spec.driver_options": unknown,
		// A path within it is as good.
		"spec.driver_option": array,
		field:                missing,
	}
}

func validateNamesTheField(t *testing.T, s *suite) {
	for name, spec := range s.invalid(t) {
		err := s.validate(t, spec)
		var field *sandbox.FieldError
		if !errors.As(err, &field) || !strings.HasPrefix(field.Field, name) {
			t.Errorf("Validate of a spec with a bad %s: %v; want a *FieldError that names it", name, err)
		}
	}
}

func createOfInvalid(t *testing.T, s *suite) {
	for name, spec := range s.invalid(t) {
		b := s.box(t)
		if err := b.tryCreate(spec); err == nil {
			t.Errorf("Create of a spec with a bad %s succeeded", name)
		}
		if b.inspect().State != sandbox.StateAbsent && !b.listed() {
			t.Errorf("Create with a bad %s left what List does not find: %+v", name, b.inspect())
		}
		b.delete()
		b.wantGone()
	}
}

// resize looks only at what the contract says. That limits hold is for each
// driver's own tests.
func resize(t *testing.T, s *suite) {
	report := step(t, s, t.Context(), "Probe", func(ctx context.Context, d sandbox.Driver) (sandbox.Report, error) {
		return d.Probe(ctx)
	})
	if report.err != nil {
		t.Fatal(report.err)
	}
	var limits sandbox.Resources
	if report.value.Limits.CPU {
		limits.CPUMillis = 500
	}
	if report.value.Limits.Memory {
		limits.MemoryMiB = 256
	}
	if report.value.Limits.Pids {
		limits.Pids = 100
	}
	b := s.box(t)
	try := func() error {
		t.Helper()
		return b.do("Resize", func(ctx context.Context, d sandbox.Driver) error {
			return d.(sandbox.Resizer).Resize(ctx, b.ref, limits)
		})
	}
	if err := try(); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("Resize of an absent one: %v, want an error that wraps ErrNotFound", err)
	}
	b.create("ready-after", "0s", "/data/ready")
	b.must("Resize", try())
	b.must("Resize", try())
	b.want(sandbox.StateCreated)
	b.startSleeper()
	b.stop(long)
	b.must("Resize", try())
	b.startSleeper()
	b.stop(long)
	b.exited(0)
}
