package machine

import (
	"debug/elf"
	"strconv"
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

func TestRosettaIsForProgramsOfX86AndForNothingElse(t *testing.T) {
	t.Parallel()
	const want = `:rosetta:M::` +
		`\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x3e\x00:` +
		`\xff\xff\xff\xff\xff\xfe\xfe\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:` +
		`/rosetta/rosetta:CF`
	rule := rosettaRule("/rosetta/rosetta")
	if rule != want {
		t.Errorf("got  %s\nwant %s", rule, want)
	}
	fields := strings.Split(rule, ":")
	magic, mask := unescape(t, fields[4]), unescape(t, fields[5])
	if len(magic) != 20 || len(mask) != len(magic) {
		t.Fatalf("%d bytes of magic and %d of mask", len(magic), len(mask))
	}
	header := func(class elf.Class, abi elf.OSABI, kind elf.Type, machine elf.Machine) string {
		ident := append([]byte(elf.ELFMAG), byte(class), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT), byte(abi), 0, 0, 0, 0, 0, 0, 0, 0)
		return string(append(ident, byte(kind), 0, byte(machine), byte(machine>>8)))
	}
	for name, c := range map[string]struct {
		head string
		want bool
	}{
		"static":           {header(elf.ELFCLASS64, elf.ELFOSABI_NONE, elf.ET_EXEC, elf.EM_X86_64), true},
		"at any address":   {header(elf.ELFCLASS64, elf.ELFOSABI_NONE, elf.ET_DYN, elf.EM_X86_64), true},
		"ABI of Linux":     {header(elf.ELFCLASS64, elf.ELFOSABI_LINUX, elf.ET_EXEC, elf.EM_X86_64), true},
		"for arm64":        {header(elf.ELFCLASS64, elf.ELFOSABI_NONE, elf.ET_EXEC, elf.EM_AARCH64), false},
		"32 bits":          {header(elf.ELFCLASS32, elf.ELFOSABI_NONE, elf.ET_EXEC, elf.EM_386), false},
		"32 bits, x86-64":  {header(elf.ELFCLASS32, elf.ELFOSABI_NONE, elf.ET_EXEC, elf.EM_X86_64), false},
		"object, unlinked": {header(elf.ELFCLASS64, elf.ELFOSABI_NONE, elf.ET_REL, elf.EM_X86_64), false},
		"core":             {header(elf.ELFCLASS64, elf.ELFOSABI_NONE, elf.ET_CORE, elf.EM_X86_64), false},
		"script":           {"#!/bin/sh\nexit 0 ###\n", false},
	} {
		matches := true
		for i := range magic {
			matches = matches && (c.head[i]^magic[i])&mask[i] == 0
		}
		if matches != c.want {
			t.Errorf("%s: %v", name, matches)
		}
	}
}

func unescape(t *testing.T, text string) string {
	t.Helper()
	plain, err := strconv.Unquote(`"` + text + `"`)
	if err != nil {
		t.Fatal(err)
	}
	return plain
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
