package image

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
)

// roleEnv names what a process that a test has started is to do instead of
// running tests.
const roleEnv = "IMAGE_TEST_ROLE"

func TestMain(m *testing.M) {
	name := os.Getenv(roleEnv)
	role := roles[name]
	if role == nil {
		role = systemRoles[name]
	}
	if role == nil {
		os.Exit(m.Run())
	}
	if err := role(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// roles are what processes of tests do.
var roles = map[string]func(args []string) error{
	"load": loadForever,
	"root": rootForever,
	"once": rootOnce,
}

// command is this program in a role.
func command(ctx context.Context, role string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	return cmd
}
