package machine

import (
	"strings"
	"testing"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

func TestTargetsThatCannotBeAreRefused(t *testing.T) {
	t.Parallel()
	for _, target := range []string{
		"", "relative", "/", "//", "/..", "/proc", "/proc/", "/sys/fs", "/dev/../dev/shm", "/run/secrets", "/a\x00b",
	} {
		if err := checkTarget(target); err == nil {
			t.Errorf("%q is taken", target)
		}
	}
	for _, target := range []string{"/data", "/procs", "/run/secretsx", "/dev/../data", "/a/b/c"} {
		if err := checkTarget(target); err != nil {
			t.Errorf("%q: %v", target, err)
		}
	}
}

func TestParentsAreMountedBeforeWhatIsInThem(t *testing.T) {
	t.Parallel()
	mounts, err := mountsOf(&guestv1.Machine{
		Disks:  []*guestv1.DataDisk{{Serial: "d", Target: "/a/b/"}},
		Shares: []*guestv1.Share{{Tag: "inner", Target: "/a/b/c"}, {Tag: "outer", Target: "/a"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, m := range mounts {
		order = append(order, m.target)
	}
	if got := strings.Join(order, " "); got != "/a /a/b /a/b/c" {
		t.Error(got)
	}
	if _, err := mountsOf(&guestv1.Machine{
		Disks: []*guestv1.DataDisk{{Target: "/a"}}, Shares: []*guestv1.Share{{Target: "/a/"}},
	}); err == nil {
		t.Error("two are mounted at one place")
	}
}

func TestNamesAreChecked(t *testing.T) {
	t.Parallel()
	for name, ok := range map[string]bool{"data0": true, "my-disk_1": true, "": false, "../x": false, "A": false, "a b": false, "a\x00": false} {
		if err := checkName("serial", name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestOOMKillsAreFound(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]uint64{
		"nr_free 3\noom_kill 7\nx 1\n": 7, "oom_killer 9\n": 0, "": 0, "oom_kill x\n": 0, "oom_kill 12": 12,
	} {
		if got := ParseOOMKills(text); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}

func TestHostsNamesTheMachine(t *testing.T) {
	t.Parallel()
	if got := hostsFile("", "10.0.0.2"); strings.Contains(got, "10.0.0.2") {
		t.Errorf("an address without a name: %q", got)
	}
	if got := hostsFile("box", "10.0.0.2"); !strings.HasSuffix(got, "10.0.0.2\tbox\n") {
		t.Errorf("%q", got)
	}
	if got := hostsFile("box", ""); !strings.HasSuffix(got, "127.0.1.1\tbox\n") {
		t.Errorf("%q", got)
	}
}
