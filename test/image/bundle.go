package image

import (
	"os"
	"path/filepath"

	"github.com/choiros/agent/internal/sandbox"
)

// BundleEnv names the environment variable that tells tests in which folder the
// bundle is: a guest of the host's architecture with a system of its own, as
// test/env/bundle makes it.
const BundleEnv = "AGENT_TEST_BUNDLE"

// Bundle returns that folder, or else where make bundle puts it in the module,
// which the working directory has to be in. Without a bundle the error is a
// *sandbox.UnavailableError.
func Bundle() (string, error) {
	dir := os.Getenv(BundleEnv)
	if dir == "" {
		dir = inModule(".cache", "bundle")
	}
	if _, err := os.Stat(filepath.Join(dir, "guest.json")); err != nil {
		return "", &sandbox.UnavailableError{Err: err, Cure: "make bundle, as root, or set " + BundleEnv + " to its folder"}
	}
	return dir, nil
}
