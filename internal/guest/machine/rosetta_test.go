//go:build linux

package machine_test

import (
	"strings"
	"testing"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

// That it works shows in internal/vm, where there is a guest for arm64.

func TestRosettaThatIsNotThereEndsTheBoot(t *testing.T) {
	t.Parallel()
	s := newSetup(t, nil, "sleep")
	s.plan.Rosetta = &guestv1.Rosetta{Tag: "rosetta"}
	if got := refusal(t, s); !strings.Contains(got, "Rosetta: mount the share rosetta: the machine has no such share") {
		t.Errorf("message %q", got)
	}
}

func TestShareWithoutRosettaEndsTheBoot(t *testing.T) {
	t.Parallel()
	s := newSetup(t, nil, "sleep")
	s.share("rosetta", "/data", true)
	s.plan.Shares, s.plan.Rosetta = nil, &guestv1.Rosetta{Tag: "rosetta"}
	if got := refusal(t, s); !strings.Contains(got, "Rosetta: the share rosetta has no program called rosetta in it") {
		t.Errorf("message %q", got)
	}
}

func TestRosettaThatCannotBeExecutedEndsTheBoot(t *testing.T) {
	t.Parallel()
	s := newSetup(t, nil, "sleep")
	write(t, s.share("rosetta", "/data", true)+"/rosetta", "not executable")
	s.plan.Shares, s.plan.Rosetta = nil, &guestv1.Rosetta{Tag: "rosetta"}
	if got := refusal(t, s); !strings.Contains(got, "have the kernel run programs for x86-64 with it: ") {
		t.Errorf("message %q", got)
	}
}

func TestSystemOfItsOwnHasNoRosetta(t *testing.T) {
	t.Parallel()
	s := serviceSetup(t)
	s.plan.Rosetta = &guestv1.Rosetta{Tag: "rosetta"}
	if got := refusal(t, s); !strings.Contains(got, "Rosetta: the system has a root of its own") {
		t.Errorf("message %q", got)
	}
}
