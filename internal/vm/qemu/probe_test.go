//go:build linux

package qemu_test

import (
	"strings"
	"testing"

	"github.com/choiros/agent/internal/vm/qemu"
)

func TestProbe(t *testing.T) {
	t.Parallel()
	require(t)
	report, err := qemu.Probe(t.Context(), qemu.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", report)
	if (report.Accelerator == qemu.KVM) != (report.WhyNotKVM == "") {
		t.Errorf("%+v", report)
	}
	for name, version := range report.Versions {
		if !strings.ContainsAny(version, "0123456789") {
			t.Errorf("%s: %q", name, version)
		}
	}
}

func TestProbeSaysWhatIsMissing(t *testing.T) {
	t.Parallel()
	report, err := qemu.Probe(t.Context(), qemu.Options{QEMU: "/nowhere/qemu", Virtiofsd: "/nowhere/virtiofsd"})
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Missing) != 2 || report.Accelerator != qemu.TCG {
		t.Fatalf("%+v", report)
	}
	for _, missing := range report.Missing {
		if !strings.Contains(missing.Cure, "apt-get install") || !strings.Contains(missing.Cure, "NixOS") {
			t.Errorf("%s: %s", missing.Name, missing.Cure)
		}
	}
}
