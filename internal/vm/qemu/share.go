//go:build linux

package qemu

import (
	"context"
	"fmt"
	"math"
	"os"
	"os/exec"
	"syscall"

	"github.com/choiros/agent/internal/vm"
)

// shareArgs are virtiofsd's for a share. Its descriptor 3 listens for QEMU.
//
// Without rights of its own it acts as this process's user, whoever it is that
// acts inside (squash-guest). What that user owns is shown as the property of
// one user inside, and what others own as nobody's.
func shareArgs(share vm.Share, sandbox string, o Options, uid, gid int) []string {
	args := []string{
		"--fd=3", "--shared-dir=" + share.Path, "--sandbox=" + sandbox, "--seccomp=kill",
		"--inode-file-handles=never", "--log-level=error",
		// A write on one side is to be seen at once on the other.
		"--cache=never", "--allow-mmap",
	}
	if share.ReadOnly {
		args = append(args, "--readonly")
	}
	args = append(args, translate("--translate-uid", o.ShareUID, uint32(uid))...)
	return append(args, translate("--translate-gid", o.ShareGID, uint32(gid))...)
}

// shareSandbox is virtiofsd's --sandbox. Where it can it goes into namespaces
// of its own, in which the share is the root: one that a guest has taken over
// sees nothing else. Some hosts do not let an ordinary user do that, or take the
// rights away that go with it, so it is tried.
func shareSandbox(ctx context.Context, virtiofsd string) string {
	cmd := exec.CommandContext(ctx, virtiofsd, "--version")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}},
		Chroot:      "/",
	}
	if cmd.Run() != nil {
		return "none"
	}
	return "namespace"
}

// nobody is what the host's other users are shown as, as in a user namespace.
const nobody = 65534

// translate maps one id inside to one outside, all others inside to that one
// too, and all others outside to nobody.
func translate(flag string, inside, outside uint32) []string {
	args := []string{fmt.Sprintf("%s=map:%d:%d:1", flag, inside, outside)}
	for _, r := range around(inside) {
		args = append(args, fmt.Sprintf("%s=squash-guest:%d:%d:%d", flag, r[0], outside, r[1]))
	}
	for _, r := range around(outside) {
		args = append(args, fmt.Sprintf("%s=squash-host:%d:%d:%d", flag, r[0], nobody, r[1]))
	}
	return args
}

// around are the ranges, first and count, of all ids but one. The last id there
// is stands for none.
func around(id uint32) [][2]uint32 {
	var ranges [][2]uint32
	if id > 0 {
		ranges = append(ranges, [2]uint32{0, id})
	}
	if id < math.MaxUint32-1 {
		ranges = append(ranges, [2]uint32{id + 1, math.MaxUint32 - id - 1})
	}
	return ranges
}

// startShare starts the virtiofsd of share i, and returns a connection to it.
func (m *machine) startShare(i int) (*os.File, error) {
	share := m.plan.config.Shares[i]
	listener, conn, err := m.dir.pair(fmt.Sprintf("fs%d", i))
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	args := shareArgs(share, m.sandbox, m.options, os.Geteuid(), os.Getegid())
	if _, err := m.children.start("virtiofsd for "+share.Tag, m.virtiofsd, args, nil, nil, listener); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}
