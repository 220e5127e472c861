//go:build linux

package machine_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

// serviceSetup is a machine with a root of its own, of whose services guestd is
// one.
func serviceSetup(t *testing.T) *setup {
	t.Helper()
	s := newSetup(t, nil)
	program := filepath.Join(s.dir, "system")
	build := exec.Command("go", "build", "-o", program, "./testdata/system")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	initramfs, err := os.ReadFile(s.config.Initrd)
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	// The kernel unpacks one archive behind the other; the format is newc's.
	var more strings.Builder
	for _, file := range []struct{ name, content string }{{"system", string(content)}, {"TRAILER!!!", ""}} {
		fmt.Fprintf(&more, "070701%08X%08X%08X%08X%08X%08X%08X%032X%08X%08X%s\x00",
			0, 0o100755, 0, 0, 1, 0, len(file.content), 0, len(file.name)+1, 0, file.name)
		more.WriteString(strings.Repeat("\x00", -more.Len()&3) + file.content)
		more.WriteString(strings.Repeat("\x00", -more.Len()&3))
	}
	s.config.Initrd = filepath.Join(s.dir, "initrd")
	write(t, s.config.Initrd, string(initramfs)+more.String())
	s.config.Cmdline += " rdinit=/system"
	s.config.Disks = nil
	s.plan.Root, s.plan.Workload = nil, nil
	return s
}

func TestServiceOfASystemHasTheSystemAsItsWorkload(t *testing.T) {
	t.Parallel()
	s := serviceSetup(t)
	s.plan.Disks = []*guestv1.DataDisk{{Serial: dataSerial, Target: "/data", Format: true}}
	s.disk(dataSerial, 64)
	g := s.boot().configure(nil)
	if greeting := g.hello(); greeting.GetPhase() != guestv1.Greeting_PHASE_RUNNING {
		t.Errorf("greeting: %v", greeting)
	}
	conn, response := g.open(&guestv1.Request{Call: &guestv1.Request_StatFile{StatFile: &guestv1.StatFile{Path: "/data"}}})
	conn.Close()
	if f := response.GetFailure(); f != nil {
		t.Errorf("the disk's folder: %v", f)
	}
	g.order(int32(syscall.SIGTERM))
	g.endsWith(0)
}

func TestServiceEndsAsItsWorkloadDoes(t *testing.T) {
	t.Parallel()
	s := serviceSetup(t)
	s.plan.Workload = &guestv1.Workload{Command: []string{"/init", "--no-such-option"}}
	g := s.boot().configure(nil)
	g.endsWith(125)
	if !strings.Contains(g.stderr.String(), "no-such-option") {
		t.Errorf("printed %q", &g.stderr)
	}
}
