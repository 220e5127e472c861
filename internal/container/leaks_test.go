package container

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// checkLeaks reports what is left of a sandbox that was deleted: mounts and
// processes that carry its container's name or folder, and files.
func checkLeaks(t *testing.T, owner string, ref sandbox.Ref) {
	t.Helper()
	d, err := New(testConfig(owner))
	if err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(guestDir(ref)); err == nil && len(entries) > 0 {
		t.Errorf("%d files are left in the guest's folder", len(entries))
	}
	// Conmon ends a moment after its container.
	var left []string
	for range 100 {
		if left = processesWith(d.name(ref.ID)); len(left) == 0 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("processes are left: %q", left)
}

// processesWith returns the command lines of processes that have an argument.
func processesWith(argument string) []string {
	var found []string
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range lines {
		line, err := os.ReadFile(file)
		if err == nil && bytes.Contains(line, []byte("\x00"+argument+"\x00")) {
			found = append(found, strings.ReplaceAll(string(line[:min(len(line), 120)]), "\x00", " "))
		}
	}
	return found
}
