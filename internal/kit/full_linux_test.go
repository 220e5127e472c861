package kit_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/choiros/agent/internal/kit"
	"github.com/choiros/agent/internal/sandbox"
)

// TestInstallOnAFullDisk runs itself in a mount namespace where there is a disk
// that is small.
func TestInstallOnAFullDisk(t *testing.T) {
	if dir := os.Getenv("KIT_TEST_DISK"); dir != "" {
		onAFullDisk(t, dir)
		return
	}
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestInstallOnAFullDisk$", "-test.v", "-test.count=1")
	cmd.Env = append(os.Environ(), "KIT_TEST_DISK="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) { // user_namespaces(7)
		const cure = "allow user namespaces: sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000"
		if strings.Contains(os.Getenv("AGENT_REQUIRE"), "namespaces") {
			t.Fatalf("no namespaces: %v\ntry: %s", err, cure)
		}
		t.Skipf("no namespaces: %v; try: %s", err, cure)
	}
	if err != nil || !strings.Contains(string(out), "--- PASS: TestInstallOnAFullDisk") {
		t.Errorf("%v\n%s", err, out)
	}
}

func onAFullDisk(t *testing.T, disk string) {
	check(t, syscall.Mount("none", disk, "tmpfs", 0, "size=128k"))
	dir, f := filepath.Join(disk, "guest-kit"), whole("6.12.1")
	for _, long := range []int{64 << 10, 1 << 20} { // no room to unpack it, and none to fetch it
		random := make([]byte, long)
		source, err := os.Open("/dev/urandom")
		check(t, err)
		_, err = source.Read(random)
		check(t, errors.Join(err, source.Close()))
		f["kernel"] = string(random)
		f.describe("arm64", "6.12.1", "kernel", "initramfs", "NOTICE")
		_, err = kit.Install(t.Context(), kit.Options{Source: save(t, f.archive(t, f.headers()...)), Dir: dir, Arch: "arm64"})
		if !errors.Is(err, sandbox.ErrExhausted) || !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%d bytes: %v", long, err)
		}
		if left := tree(t, dir); left != nil {
			t.Errorf("it left %q", left)
		}
	}
}
