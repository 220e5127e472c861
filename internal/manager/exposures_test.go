package manager

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

// shown mounts a new folder with an .env in it.
func shown(t *testing.T, spec sandbox.Spec) (mounting sandbox.Spec, folder string) {
	t.Helper()
	folder = t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, ".env"), []byte("A=b"), 0o600); err != nil {
		t.Fatal(err)
	}
	spec.Mounts = []sandbox.Mount{{Kind: sandbox.MountData, Source: folder}}
	return spec, folder
}

func exposes(s *Sandbox) bool {
	return len(s.Exposures) == 1 && s.Exposures[0].Target == "/data" && s.Exposures[0].Total == 1
}

func TestExposuresAreSeenBeforeTheWorkloadRuns(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec, _ := shown(t, process.Spec("sleep"))
	var before *Sandbox
	h.onStep(func(step string) {
		if step == "boot:launch" {
			before = h.get("web")
		}
	})
	if s := h.create("web", spec); !exposes(s) || before == nil || !exposes(before) {
		t.Errorf("ready %+v, before %+v", s.Exposures, before)
	}
}

func TestExposuresOfWhatFailedAreSeen(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec, _ := shown(t, process.Spec("exit", "3"))
	spec.Readiness = sandbox.Readiness{Exec: process.Command("exit", "1"), Timeout: time.Minute}
	_, err := h.m.Create(t.Context(), CreateRequest{Name: "web", Spec: spec, Start: true})
	if s := h.get("web"); !errors.Is(err, sandbox.ErrEnded) || s.Phase != PhaseFailed || !exposes(s) {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestAdoptedSandboxesAreLookedAtAgain(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec, folder := shown(t, process.Spec("sleep"))
	if err := os.Rename(filepath.Join(folder, ".env"), filepath.Join(folder, "env")); err != nil {
		t.Fatal(err)
	}
	if s := h.create("web", spec); len(s.Exposures) != 0 {
		t.Errorf("exposes %+v", s.Exposures)
	}
	if err := os.Rename(filepath.Join(folder, "env"), filepath.Join(folder, ".env")); err != nil {
		t.Fatal(err)
	}
	h.restart()
	if s := h.await("web", "seen to expose it", exposes); s.Phase != PhaseReady || s.Generation != 1 {
		t.Errorf("%+v", s)
	}
}
