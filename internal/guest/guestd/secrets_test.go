//go:build linux

package guestd

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

func TestSecretsArrive(t *testing.T) {
	t.Parallel()
	dir := memoryDir(t)
	ready := filepath.Join(t.TempDir(), "ready")
	g := boot(t, withSecrets(dir), "sh", "-c", "trap 'echo hup' HUP; printf '%s|' \"$TOKEN\"; cat "+dir+"/key; : >"+ready+"; while :; do sleep 0.02; done")
	g.configure(&guestv1.Configure{Secrets: []*guestv1.Secret{
		{Name: "TOKEN", Value: []byte("first")},
		{Name: "key", Value: []byte("file\x00first"), File: true},
	}})
	g.eventually("the workload has read them", func() bool {
		_, err := os.Stat(ready)
		return err == nil
	})
	info, err := os.Stat(filepath.Join(dir, "key"))
	if err != nil || info.Mode() != 0o400 {
		t.Errorf("%v, %v", info, err)
	}
	g.tell(&guestv1.Request{Call: &guestv1.Request_UpdateSecrets{UpdateSecrets: &guestv1.UpdateSecrets{
		Secrets: []*guestv1.Secret{{Name: "TOKEN", Value: []byte("second")}, {Name: "key", Value: []byte("2"), File: true}},
		Signal:  1,
	}}})
	if out := g.output(&guestv1.Exec{Command: []string{"sh", "-c", "printf '%s|' $TOKEN; cat " + dir + "/key"}}); out != "second|2" {
		t.Errorf("an exec sees %q", out)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
	_ = g.cmd.Process.Signal(unix.SIGTERM)
	g.exits()
	if out := g.stdout.String(); out != "first|file\x00firsthup\n" && out != "first|file\x00first" {
		t.Errorf("the workload printed %q", out)
	}
}

func withSecrets(dir string) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) {
		cmd.Args = append(append(cmd.Args[:2:2], "--secrets-dir", dir), cmd.Args[2:]...)
	}
}

// memoryDir returns a folder in memory.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "guestd")
	if err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestSecretsThatCannotBeTakenStartNothing(t *testing.T) {
	t.Parallel()
	dir := memoryDir(t)
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	g := boot(t, withSecrets(dir), sleeper()...)
	for _, secret := range []*guestv1.Secret{
		{Name: "../x", File: true},
		{Name: "..", File: true},
		{Name: "", File: true},
		{Name: "a/b", File: true},
		{Name: strings.Repeat("n", 300), File: true},
		{Name: "A=B"},
		{Name: ""},
		{Name: "ZERO", Value: []byte{0}},
	} {
		secret.Value = append(secret.GetValue(), "canary"...)
		text := g.refused(guestv1.Failure_CODE_INVALID, configureRequest(&guestv1.Configure{Secrets: []*guestv1.Secret{secret}}))
		if strings.Contains(text, "canary") {
			t.Errorf("the value is in %q", text)
		}
	}
	if n := len(g.children()); n != 0 {
		t.Errorf("%d children", n)
	}
	// A link is replaced, not followed.
	g.configure(&guestv1.Configure{Secrets: []*guestv1.Secret{{Name: "link", Value: []byte("s"), File: true}}})
	if text, err := os.ReadFile(outside); err != nil || string(text) != "mine" {
		t.Errorf("%q, %v", text, err)
	}
}

func TestSecretsAreNotWrittenToDisks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err != nil || stat.Type == unix.TMPFS_MAGIC {
		dir = "/sys"
	}
	g := boot(t, withSecrets(dir), sleeper()...)
	g.refused(guestv1.Failure_CODE_STATE, configureRequest(&guestv1.Configure{Secrets: []*guestv1.Secret{{Name: "a", File: true}}}))
	g = boot(t, withSecrets("/no/such"), sleeper()...)
	g.refused(guestv1.Failure_CODE_NOT_FOUND, configureRequest(&guestv1.Configure{Secrets: []*guestv1.Secret{{Name: "a", File: true}}}))
	g.configure(&guestv1.Configure{})
}
