package server_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/choiros/agent/internal/container"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/internal/server/servertest"
	"github.com/choiros/agent/test/image"
)

// TestContractOnPodman is the driver contract on real containers, reached the
// way that callers reach them.
func TestContractOnPodman(t *testing.T) {
	if testing.Short() {
		t.Skip("the same on child processes is enough for -short")
	}
	agent := startAgent(t, agentOptions{
		Drivers: func(owner string) map[string]sandbox.Driver {
			return map[string]sandbox.Driver{"podman": openPodman(t, owner, image.RootOCI)}
		},
		Manager: manager.Config{MaxConcurrentBoots: 10},
	})
	conn := agent.Dial(t)
	drivertest.Run(t, drivertest.Harness{
		Open: func(*testing.T) sandbox.Driver { return servertest.New(conn, "podman") },
		Spec: func(_ *testing.T, w drivertest.Workload) sandbox.Spec {
			return sandbox.Spec{Driver: "podman", Image: image.RootName, Command: w.Args, Mounts: w.Mounts, Env: w.Env}
		},
		GuestDir: "/run/choiros",
		Patience: 5 * time.Minute,
		Without:  drivertest.Without{Dial: true, Configure: true},
	})
}

// openPodman opens the driver until the test ends, with images loaded.
func openPodman(t *testing.T, owner string, archives ...string) sandbox.Driver {
	t.Helper()
	podman, err := container.New(container.Config{
		RuntimeDir: os.Getenv("XDG_RUNTIME_DIR"), Owner: owner, GuestdDir: image.Guestd(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := podman.Close(); err != nil {
			t.Error(err)
		}
	})
	_, err = podman.Probe(t.Context())
	drivertest.Require(t, "podman", err)
	for _, name := range archives {
		archive, err := os.Open(filepath.Join(image.Dir(t), name))
		if err != nil {
			t.Fatal(err)
		}
		_, err = podman.LoadImage(t.Context(), archive)
		if err = errors.Join(err, archive.Close()); err != nil {
			t.Fatal(err)
		}
	}
	return podman
}
