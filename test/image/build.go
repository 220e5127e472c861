package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
)

// DirEnv names the environment variable that tells tests in which folder Build
// has put the archives, so that the images are built once for a whole test run.
const DirEnv = "AGENT_TEST_IMAGES"

// The archives of the images for the host's architecture that Build makes.
const (
	RootOCI    = "workload.oci.tar"
	RootDocker = "workload.docker.tar"
	UserOCI    = "workload-user.oci.tar"
	UserDocker = "workload-user.docker.tar"
)

// ArchOCI is the archive of ArchName that Build makes, for amd64 and arm64.
func ArchOCI(arch string) string { return "workload-" + arch + ".oci.tar" }

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

// Build puts the archives of all default images into dir, which it makes. Each
// is complete as soon as it has its name.
func Build(ctx context.Context, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, arch := range []string{"amd64", "arm64"} {
		binary, err := BinaryFor(ctx, arch)
		if err != nil {
			return err
		}
		archives := map[string]Spec{ArchOCI(arch): {Name: ArchName(arch), Format: OCI, Arch: arch}}
		if arch == runtime.GOARCH {
			archives[RootOCI] = Spec{Name: RootName, Format: OCI}
			archives[RootDocker] = Spec{Name: RootName, Format: Docker}
			archives[UserOCI] = Spec{Name: UserName, Format: OCI, User: "1000"}
			archives[UserDocker] = Spec{Name: UserName, Format: Docker, User: "1000"}
		}
		for file, spec := range archives {
			if err := WriteFile(filepath.Join(dir, file), binary, spec); err != nil {
				return err
			}
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

// Binary is BinaryFor the host's architecture.
func Binary(ctx context.Context) ([]byte, error) { return BinaryFor(ctx, runtime.GOARCH) }

// BinaryFor compiles test/workload, static, for Linux on an architecture. It
// must run within the module.
func BinaryFor(ctx context.Context, arch string) (binary []byte, err error) {
	dir, err := os.MkdirTemp("", "workload")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	out := filepath.Join(dir, "workload")
	// No build id, path or revision: none of them is content.
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags=-s -w -buildid=", "-o", out, "github.com/choiros/agent/test/workload")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOFLAGS=")
	if b, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build test/workload for %s: %w: %s", arch, err, b)
	}
	return os.ReadFile(out)
}
