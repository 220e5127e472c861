package image

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// GuestdEnv names the environment variable that tells tests in which folder
// guestd was built for all of them.
const GuestdEnv = "AGENT_TEST_GUESTD"

// GuestdDir returns the folder in which tests have the program guestd: the one
// that AGENT_TEST_GUESTD names, or else .cache/guestd of the module, which the
// working directory has to be in. See Guestd for whether it is there.
func GuestdDir() string {
	if dir := os.Getenv(GuestdEnv); dir != "" {
		return dir
	}
	return inModule(".cache", "guestd")
}

// inModule is a path below the module's folder, in which the working directory
// has to be; empty if it is not.
func inModule(path ...string) string {
	dir, err := os.Getwd()
	if err != nil {
		return ""
	}
	for root := dir; ; root = filepath.Dir(root) {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			return filepath.Join(append([]string{root}, path...)...)
		}
		if root == filepath.Dir(root) {
			return ""
		}
	}
}

var guestdOnce struct {
	sync.Once
	err error
}

// Guestd returns GuestdDir. If AGENT_TEST_GUESTD is not set it builds guestd
// there first, once for each test binary.
func Guestd(t testing.TB) string {
	t.Helper()
	dir := GuestdDir()
	if os.Getenv(GuestdEnv) != "" {
		return dir
	}
	guestdOnce.Do(func() { guestdOnce.err = buildGuestd(context.WithoutCancel(t.Context()), dir) })
	if guestdOnce.err != nil {
		t.Fatalf("%v\n(or set %s to a folder with the program guestd)", guestdOnce.err, GuestdEnv)
	}
	return dir
}

// buildGuestd puts the program guestd into dir, which it makes: static, for
// Linux on the host's architecture, and complete as soon as it has its name.
func buildGuestd(ctx context.Context, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	unfinished := filepath.Join(dir, fmt.Sprintf(".guestd-%d", os.Getpid()))
	defer func() { _ = os.Remove(unfinished) }() // after the rename there is nothing of that name
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w",
		"-o", unfinished, "github.com/choiros/agent/cmd/guestd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOFLAGS=")
	if b, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build cmd/guestd: %w: %s", err, b)
	}
	return os.Rename(unfinished, filepath.Join(dir, guestdFile))
}

const guestdFile = "guestd"
