package machine

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

// ParseOOMKills finds the counter of processes killed for want of memory in
// /proc/vmstat, or in a control group's memory.events; 0 if it is not there.
func ParseOOMKills(vmstat string) uint64 {
	for line := range strings.Lines(vmstat) {
		if value, ok := strings.CutPrefix(line, "oom_kill "); ok {
			n, _ := strconv.ParseUint(strings.TrimSpace(value), 10, 64)
			return n
		}
	}
	return 0
}

// mount is a disk or a share that is to be mounted. One of them is set.
type mount struct {
	target string
	disk   *guestv1.DataDisk
	share  *guestv1.Share
}

// mountsOf lists what is to be mounted, what is below another's target after
// it.
func mountsOf(m *guestv1.Machine) ([]mount, error) {
	var mounts []mount
	for _, d := range m.GetDisks() {
		mounts = append(mounts, mount{target: d.GetTarget(), disk: d})
	}
	for _, s := range m.GetShares() {
		mounts = append(mounts, mount{target: s.GetTarget(), share: s})
	}
	for i := range mounts {
		if err := checkTarget(mounts[i].target); err != nil {
			return nil, err
		}
		mounts[i].target = path.Clean(mounts[i].target)
	}
	slices.SortFunc(mounts, func(a, b mount) int { return strings.Compare(a.target, b.target) })
	for i := 1; i < len(mounts); i++ {
		if mounts[i].target == mounts[i-1].target {
			return nil, fmt.Errorf("two are to be mounted at %s", mounts[i].target)
		}
	}
	return mounts, nil
}

// checkTarget refuses targets that are no path, or where the machine itself has
// something mounted.
func checkTarget(target string) error {
	if !path.IsAbs(target) || strings.ContainsRune(target, 0) {
		return fmt.Errorf("%q is no absolute path to mount at", target)
	}
	target = path.Clean(target)
	if target == "/" {
		return errors.New("nothing can be mounted at /")
	}
	for _, taken := range []string{"/proc", "/sys", "/dev", "/run/secrets"} {
		if target == taken || strings.HasPrefix(target, taken+"/") {
			return fmt.Errorf("nothing can be mounted at %s: that is the machine's own", target)
		}
	}
	return nil
}

// checkName refuses what is no plain name: of a file system's type, a disk's
// serial, a share's tag.
func checkName(what, name string) error {
	ok := name != ""
	for _, r := range name {
		ok = ok && (r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '_')
	}
	if !ok {
		return fmt.Errorf("%q is no %s", name, what)
	}
	return nil
}

// The beginning of a program's file for x86-64 (ELF, 64 bits, little-endian), and
// which of its bits count: whatever the system's ABI, and whether or not it can
// be loaded at any address (ET_EXEC, ET_DYN). It is the one that Apple has for
// Rosetta; see "Running Intel Binaries in Linux VMs with Rosetta" in the
// documentation of Virtualization.
const (
	x86Magic = `\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x3e\x00`
	x86Mask  = `\xff\xff\xff\xff\xff\xfe\xfe\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff`
)

// rosettaRule has the kernel start a program in the stead of those for x86-64;
// see Documentation/admin-guide/binfmt-misc.rst. F has it opened at once, C
// keeps the rights of a program that has those of its owner.
func rosettaRule(program string) string {
	return ":rosetta:M::" + x86Magic + ":" + x86Mask + ":" + program + ":CF"
}

// hostsFile is /etc/hosts of a machine with a name and an address; either may
// be empty.
func hostsFile(hostname, address string) string {
	text := "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	if hostname == "" {
		return text
	}
	if address == "" {
		address = "127.0.1.1"
	}
	return text + address + "\t" + hostname + "\n"
}

// resolvFile is /etc/resolv.conf.
func resolvFile(nameservers []string) string {
	var text strings.Builder
	for _, server := range nameservers {
		text.WriteString("nameserver " + server + "\n")
	}
	return text.String()
}
