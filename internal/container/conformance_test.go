package container

import (
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/test/image"
)

func TestConformance(t *testing.T) {
	for name, img := range map[string]string{"root": image.RootName, "user": image.UserName} {
		t.Run(name, func(t *testing.T) {
			if testing.Short() && name != "root" {
				t.Skip("one image is enough for -short")
			}
			owner := backend(t).cfg.Owner
			drivertest.Run(t, drivertest.Harness{
				Open:   func(t *testing.T) sandbox.Driver { return mustNew(t, owner) },
				OpenAs: func(t *testing.T, name string) sandbox.Driver { return mustNew(t, ownerNamed(owner, name)) },
				Spec: func(_ *testing.T, w drivertest.Workload) sandbox.Spec {
					return sandbox.Spec{Driver: "podman", Image: img, Command: w.Args, Mounts: w.Mounts, Env: w.Env}
				},
				GuestDir: guestTarget,
				Root:     "/tmp",
				Kill:     drivertest.VerbProcess(owner),
				Leaks:    func(t *testing.T, ref sandbox.Ref) { checkLeaks(t, owner, ref) },
				Patience: 5 * time.Minute,
			})
		})
	}
}

func mustNew(t *testing.T, owner string) *Driver {
	t.Helper()
	d, err := New(testConfig(owner))
	if err != nil {
		t.Fatal(err)
	}
	return d
}
