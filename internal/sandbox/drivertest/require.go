package drivertest

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/choiros/agent/internal/sandbox"
)

// Require skips the test if a backend does not work here, err being what its
// driver's Probe said, and tells what mends it. If the environment variable
// AGENT_REQUIRE, a list with commas, names the backend, the test fails instead.
func Require(t testing.TB, backend string, err error) {
	t.Helper()
	if err == nil {
		return
	}
	cure := `test/env/podman-env up, then go test -exec "$PWD/test/env/podman-env exec"`
	if unavailable, ok := errors.AsType[*sandbox.UnavailableError](err); ok && unavailable.Cure != "" {
		cure += "; or: " + unavailable.Cure
	}
	if slices.Contains(strings.Split(os.Getenv("AGENT_REQUIRE"), ","), backend) {
		t.Fatalf("no %s: %v\ntry: %s", backend, err, cure)
	}
	t.Skipf("no %s: %v; try: %s", backend, err, cure)
}
