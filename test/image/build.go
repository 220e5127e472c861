package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// DirEnv names the environment variable that tells tests in which folder Build
// has put the archives, so that the images are built once for a whole test run.
const DirEnv = "AGENT_TEST_IMAGES"

// The archives that Build makes.
const (
	RootOCI    = "workload.oci.tar"
	RootDocker = "workload.docker.tar"
	UserOCI    = "workload-user.oci.tar"
	UserDocker = "workload-user.docker.tar"
)

// Dir returns a folder with the archives that Build makes: the one that
// AGENT_TEST_IMAGES names, or else one of the test's own, which takes the Go
// toolchain and some seconds.
func Dir(t testing.TB) string {
	t.Helper()
	if dir := os.Getenv(DirEnv); dir != "" {
		return dir
	}
	dir := t.TempDir()
	if err := Build(t.Context(), dir); err != nil {
		t.Fatalf("%v\n(or set %s to what `go run ./test/image/cmd/mkimage -all DIR` made)", err, DirEnv)
	}
	return dir
}

// Build puts the archives of both default images, in both formats, into dir,
// which it makes. Each is complete as soon as it has its name.
func Build(ctx context.Context, dir string) error {
	binary, err := Binary(ctx)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for file, spec := range map[string]Spec{
		RootOCI:    {Name: RootName, Format: OCI},
		RootDocker: {Name: RootName, Format: Docker},
		UserOCI:    {Name: UserName, Format: OCI, User: "1000"},
		UserDocker: {Name: UserName, Format: Docker, User: "1000"},
	} {
		if err := WriteFile(filepath.Join(dir, file), binary, spec); err != nil {
			return err
		}
	}
	return nil
}

// WriteFile is Write to a file, which gets its name once it is complete. What is
// no regular file, a pipe or a device, is written to as it is.
func WriteFile(path string, binary []byte, spec Spec) error {
	var b bytes.Buffer
	if err := Write(&b, binary, spec); err != nil {
		return err
	}
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return os.WriteFile(path, b.Bytes(), 0)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path))
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // after the rename there is nothing of that name
	if _, err = f.Write(b.Bytes()); err == nil {
		// Others than the builder load it: CreateTemp gave 0600.
		err = f.Chmod(0o644)
	}
	if err1 := f.Close(); err == nil {
		err = err1
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// Binary compiles test/workload, static, for Linux on the host's architecture.
// It must run within the module.
func Binary(ctx context.Context) (binary []byte, err error) {
	dir, err := os.MkdirTemp("", "workload")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	out := filepath.Join(dir, "workload")
	// No build id, path or revision: none of them is content.
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags=-s -w -buildid=", "-o", out, "github.com/choiros/agent/test/workload")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOFLAGS=")
	if b, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build test/workload: %w: %s", err, b)
	}
	return os.ReadFile(out)
}
