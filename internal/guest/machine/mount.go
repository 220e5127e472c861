//go:build linux

package machine

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// mount mounts a disk or a share at its target. It is made if it is absent; a
// link of the image's on the way leads to where it leads in here.
func (mk *maker) mount(m mount) error {
	target, made, err := makeTarget(m.target)
	if err != nil {
		return fmt.Errorf("mount at %s: %w", m.target, err)
	}
	if m.share != nil {
		if err := mountShare(m, target); err != nil {
			return fmt.Errorf("mount the share %s at %s: %w", m.share.GetTag(), m.target, err)
		}
		return nil
	}
	if err := mk.mountData(m, target, made); err != nil {
		return fmt.Errorf("mount the disk %s at %s: %w", m.disk.GetSerial(), m.target, err)
	}
	return nil
}

func mountShare(m mount, target string) error {
	if err := checkName("share's tag", m.share.GetTag()); err != nil {
		return err
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
	if m.share.GetReadOnly() {
		flags |= unix.MS_RDONLY
	}
	err := unix.Mount(m.share.GetTag(), target, "virtiofs", flags, "")
	if errors.Is(err, unix.EINVAL) {
		return errors.New("the machine has no such share")
	}
	return err
}

func (mk *maker) mountData(m mount, target string, made bool) error {
	device, err := mk.findDisk(m.disk.GetSerial())
	if err != nil {
		return err
	}
	// Whose the place is before anything is mounted on it.
	var place unix.Stat_t
	if err := unix.Stat(target, &place); err != nil {
		return err
	}
	if err := mountDisk(device, target, m.disk.GetReadOnly(), m.disk.GetFormat(), mk.noteOf(m.disk.GetSerial())); err != nil {
		return err
	}
	if m.disk.GetReadOnly() {
		return nil
	}
	if err := mk.keep(target); err != nil {
		return err
	}
	if !begun(target) {
		return nil
	}
	renew(target)
	if made {
		place.Uid, place.Gid = mk.owner()
	}
	if err := own(target, &place); err != nil {
		return err
	}
	return settleIn(target)
}

// begun reports whether a file system was formatted, and nothing was done with
// it since: it has what mke2fs puts there, and nothing else.
func begun(target string) bool {
	entries, err := os.ReadDir(target)
	return err == nil && len(entries) == 1 && entries[0].Name() == "lost+found" && entries[0].IsDir()
}

// settleIn ends that, last of all. Programs want to find a new disk empty.
func settleIn(target string) error {
	return os.Remove(path.Join(target, "lost+found"))
}

func own(target string, as *unix.Stat_t) error {
	if err := os.Chown(target, int(as.Uid), int(as.Gid)); err != nil {
		return err
	}
	return unix.Chmod(target, as.Mode&0o7777)
}

// maxLinks is how many links a target may lead through, as for the kernel.
const maxLinks = 40

// makeTarget makes the folder to mount at, if it is absent, and returns it with
// all links followed, those that lead to what is absent, too.
func makeTarget(target string) (resolved string, made bool, err error) {
	resolved, rest := "/", target
	for links := 0; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(strings.TrimLeft(rest, "/"), "/")
		next := path.Join(resolved, name) // the root's parent is the root
		info, err := os.Lstat(next)
		switch {
		case errors.Is(err, os.ErrNotExist):
			err = os.Mkdir(next, 0o755)
			made = true
		case err == nil && info.Mode()&os.ModeSymlink != 0:
			if links++; links > maxLinks {
				return "", false, unix.ELOOP
			}
			var to string
			if to, err = os.Readlink(next); err == nil {
				rest, next = to+"/"+rest, resolved
				if path.IsAbs(to) {
					next = "/"
				}
			}
		case err == nil && !info.IsDir():
			err = fmt.Errorf("%s is not a folder", next)
		}
		if err != nil {
			return "", false, err
		}
		resolved = next
	}
	return resolved, made, checkTarget(resolved)
}
