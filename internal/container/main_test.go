package container

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"hash/fnv"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/test/image"
)

func TestMain(m *testing.M) {
	drivertest.VerbMain(func(owner string) (sandbox.Driver, error) { return New(testConfig(owner)) })
	os.Exit(m.Run())
}

// testConfig is how the tests reach the user's Podman.
func testConfig(owner string) Config {
	return Config{RuntimeDir: os.Getenv("XDG_RUNTIME_DIR"), Owner: owner, GuestdDir: image.GuestdDir()}
}

// newOwner returns an owner whom nobody else is.
func newOwner() string {
	var b [4]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// ownerNamed turns any name into an owner.
func ownerNamed(base, name string) string {
	h := fnv.New32a()
	h.Write([]byte(base + name))
	return hex.EncodeToString(h.Sum(nil))
}

// open returns a driver for an owner and closes it when the test ends.
func open(t testing.TB, owner string) *Driver {
	t.Helper()
	d, err := New(testConfig(owner))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return d
}

// backend returns a driver on the user's Podman, for an owner of the test's
// own, with the test images loaded. Without a Podman the test is skipped, or
// fails if AGENT_REQUIRE has podman in it. When the test ends nothing of the
// owner's may be left.
func backend(t testing.TB) *Driver {
	t.Helper()
	d := open(t, newOwner())
	requirePodman(t, d)
	t.Cleanup(func() {
		ids, err := d.List(context.Background())
		if err != nil || len(ids) > 0 {
			t.Errorf("left behind: %q, %v", ids, err)
		}
		for _, id := range ids {
			_ = d.Delete(context.Background(), sandbox.Ref{ID: id, Dir: t.TempDir()})
		}
	})
	return d
}

func requirePodman(t testing.TB, d *Driver) {
	t.Helper()
	if err := prepared(t, d); err != nil {
		var unavailable *sandbox.UnavailableError
		cure := "test/env/podman-env up, then go test -exec \"$PWD/test/env/podman-env exec\""
		if errors.As(err, &unavailable) && unavailable.Cure != "" {
			cure += "; or: " + unavailable.Cure
		}
		if slices.Contains(strings.Split(os.Getenv("AGENT_REQUIRE"), ","), "podman") {
			t.Fatalf("no podman: %v (%s)", err, cure)
		}
		t.Skipf("no podman: %v (%s)", err, cure)
	}
}

var preparation struct {
	sync.Mutex
	done bool
	err  error
}

// prepared sees once that Podman is there, and loads the images.
func prepared(t testing.TB, d *Driver) error {
	preparation.Lock()
	defer preparation.Unlock()
	if preparation.done {
		return preparation.err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	image.Guestd(t)
	if _, err := d.Probe(ctx); err != nil {
		preparation.done, preparation.err = true, err
		return err
	}
	dir := image.Dir(t)
	for _, file := range []string{image.RootOCI, image.UserDocker} {
		archive, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.LoadImage(ctx, bytes.NewReader(archive)); err != nil {
			t.Fatal(err)
		}
	}
	preparation.done = true
	return nil
}
