package image

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

// KitEnv names the environment variable that tells tests in which folder the
// guest kit of the host's architecture is.
const KitEnv = "AGENT_TEST_KIT"

// KitDir returns that folder, or else where make guest-kit puts it in the
// module, which the working directory has to be in.
func KitDir() string {
	if dir := os.Getenv(KitEnv); dir != "" {
		return dir
	}
	return inModule("bin", "guest-kit", runtime.GOARCH)
}

// KitDirFor returns the folder of the kit of an architecture: KitDir if that is
// the host's, or else the one beside it.
func KitDirFor(arch string) string {
	if arch == runtime.GOARCH {
		return KitDir()
	}
	return filepath.Join(filepath.Dir(KitDir()), arch)
}

// Kit returns KitDir, and fails the test if there is no kit.
func Kit(t testing.TB) string {
	t.Helper()
	dir := KitDir()
	if _, err := os.Stat(filepath.Join(dir, "guest.json")); err != nil {
		t.Fatalf("no guest kit: %v (make guest-kit, or set %s to its folder)", err, KitEnv)
	}
	return dir
}
