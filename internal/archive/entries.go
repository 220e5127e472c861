package archive

import (
	"archive/tar"
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// file makes a file under a name of its own, and moves it into place.
func (u *unpacker) file(at *os.Root, base string, header *tar.Header, data io.Reader) error {
	if limit := u.options.MaxBytes; limit > 0 && header.Size > limit-u.summary.Bytes {
		return fmt.Errorf("%w: more than %d bytes", ErrLimit, limit)
	}
	temp := tempName()
	f, err := at.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = u.fill(f, header, data)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = at.Chtimes(temp, time.Time{}, sane(header.ModTime))
	}
	return place(at, temp, base, err)
}

// fill gives a file its contents, and then its owner and its mode: a change of
// owner takes setuid away, and who may read it should come last.
func (u *unpacker) fill(f *os.File, header *tar.Header, data io.Reader) error {
	n, err := writeSparse(u.ctx, f, data, u.buffer)
	u.summary.Bytes += n
	if err != nil {
		return err
	}
	if u.options.Owners {
		if err := f.Chown(header.Uid, header.Gid); err != nil {
			return err
		}
	}
	return f.Chmod(u.mode(header, dataPerm))
}

// place moves what was made under a temporary name to its own, or removes it
// if it could not be made.
func place(at *os.Root, temp, base string, err error) error {
	if err == nil {
		err = at.Rename(temp, base)
	}
	if err != nil {
		if removeErr := at.Remove(temp); !errors.Is(removeErr, fs.ErrNotExist) {
			err = errors.Join(err, removeErr)
		}
	}
	return err
}

func tempName() string { return tempPrefix + rand.Text() }

// mode returns the mode of an entry, with no bits but those that are
// allowed.
func (u *unpacker) mode(header *tar.Header, allowed int64) fs.FileMode {
	if u.options.SetID {
		allowed = setIDPerm
	}
	bits := header.Mode & allowed
	mode := fs.FileMode(bits & dataPerm) //nolint:gosec // Nine bits.
	for bit, flag := range map[int64]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if bits&bit != 0 {
			mode |= flag
		}
	}
	return mode
}

// sane keeps a time within what is counted in nanoseconds.
func sane(t time.Time) time.Time {
	first, last := time.Unix(0, -1<<63), time.Unix(0, 1<<63-1)
	switch {
	case t.Before(first):
		return first
	case t.After(last):
		return last
	}
	return t
}

func (u *unpacker) symlink(at *os.Root, name string, header *tar.Header) error {
	target := header.Linkname
	if target == "" || len(target) > maxPath || strings.ContainsRune(target, 0) {
		return fmt.Errorf("%w: the link's target %s cannot be used", ErrRefused, clip(target))
	}
	if !u.options.AnyLinks && !u.inside(name, target) {
		if u.options.Skipped == nil {
			return fmt.Errorf("%w: the link's target %s is outside of what is unpacked", ErrRefused, clip(target))
		}
		u.options.Skipped(name, "the link's target "+clip(target)+" is outside of what is unpacked")
		return nil
	}
	temp := tempName()
	if err := at.Symlink(target, temp); err != nil {
		return err
	}
	err := setLinkTime(at, temp, sane(header.ModTime))
	if err == nil && u.options.Owners {
		err = at.Lchown(temp, header.Uid, header.Gid)
	}
	err = place(at, temp, path.Base(name), err)
	u.leave()
	return err
}

// setLinkTime sets the time of a link itself, which os.Root cannot.
func setLinkTime(at *os.Root, name string, t time.Time) error {
	dir, err := at.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	times := []unix.Timespec{unix.NsecToTimespec(t.UnixNano()), unix.NsecToTimespec(t.UnixNano())}
	err = unix.UtimesNanoAt(int(dir.Fd()), name, times, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTSUP) {
		return nil // not on every system
	}
	return err
}

// inside reports whether a link stays in what is unpacked. It is asked where
// no folder on the way to the link is a link. Then each ".." that the target
// begins with is a real folder's parent, and what follows only descends, be it
// through other links, which were asked about too. A ".." further on could be
// that of a folder behind a link.
func (u *unpacker) inside(name, target string) bool {
	if path.IsAbs(target) {
		return false
	}
	up, descends := 0, false
	for element := range strings.SplitSeq(target, "/") {
		switch {
		case element == "" || element == ".":
		case element != "..":
			descends = true
		case descends:
			return false
		default:
			up++
		}
	}
	above := strings.Count(name, "/")
	if rename := u.options.Rename; rename != "" && rename != "." {
		above = max(above-1, 0) // what was there beside it is not part of it
	}
	return up <= above
}

func (u *unpacker) link(name string, header *tar.Header) error {
	old, err := u.name(header.Linkname)
	if err != nil {
		return err
	}
	from, err := u.parent(path.Dir(old)) // asks whether there are links on the way
	if err != nil {
		return err
	}
	info, err := from.Lstat(path.Base(old))
	if err != nil {
		return err
	}
	if info.Mode().Type()&^fs.ModeSymlink != 0 {
		return fmt.Errorf("%w: the link's target %s is no file", ErrRefused, clip(old))
	}
	at, err := u.parent(path.Dir(name))
	if err != nil {
		return err
	}
	// To move one name of a file to another of its names does nothing: rename(2).
	if there, err := at.Lstat(path.Base(name)); err == nil && os.SameFile(info, there) {
		return nil
	}
	temp := tempName()
	if err := u.root.Link(old, path.Join(path.Dir(name), temp)); err != nil {
		return err
	}
	err = place(at, temp, path.Base(name), nil)
	u.leave()
	return err
}

// folder is one that was made, or found, and gets its mode and time when
// nothing more is put in it.
type folder struct {
	name   string
	header *tar.Header // for its owner, mode and time
}

func (u *unpacker) folder(at *os.Root, name string, header *tar.Header) error {
	base := path.Base(name)
	info, err := at.Lstat(base)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = at.Mkdir(base, 0o700)
	case err != nil:
	case info.IsDir():
		if info.Mode()&0o700 != 0o700 { // must be filled first
			err = at.Chmod(base, info.Mode()|0o700)
		}
	case info.Mode().Type() == fs.ModeSymlink && u.options.AnyLinks:
		if info, err = u.root.Stat(name); err == nil && !info.IsDir() {
			err = fmt.Errorf("%w: %s is a link to a file here, and a folder in the archive", ErrRefused, clip(name))
		}
	default:
		err = fmt.Errorf("%w: %s is no folder here, and one in the archive", ErrRefused, clip(name))
	}
	if err != nil {
		return err
	}
	u.pending = append(u.pending, folder{name, &tar.Header{
		Mode: header.Mode, Uid: header.Uid, Gid: header.Gid, ModTime: header.ModTime,
	}})
	if len(u.pending) < maxFolders {
		return nil
	}
	// Streams go through one folder after the other, as a rule: those that do
	// not lead here are done.
	return u.settle(name)
}

// settle sets the modes and times of folders, those that lead to a name
// excepted, if there is one.
func (u *unpacker) settle(except string) error {
	ready := u.pending
	u.pending = nil
	if except != "" {
		var waiting []folder
		ready = slices.DeleteFunc(ready, func(f folder) bool {
			leads := strings.HasPrefix(except+"/", f.name+"/")
			if leads {
				waiting = append(waiting, f)
			}
			return leads
		})
		u.pending = waiting
	}
	// The innermost first: their parents may become closed to us. Of two
	// entries about one folder the later counts.
	slices.SortStableFunc(ready, func(a, b folder) int { return cmp.Compare(b.name, a.name) })
	var first error
	for _, f := range ready {
		if err := u.settleOne(f); err != nil && first == nil {
			first = fmt.Errorf("unpack %s: %w", clip(f.name), translate(err))
		}
	}
	return first
}

func (u *unpacker) settleOne(f folder) error {
	at, name := u.root, f.name
	if !u.options.AnyLinks {
		dir, err := u.parent(path.Dir(name))
		if err != nil {
			return err
		}
		at, name = dir, path.Base(name)
	}
	if u.options.Owners {
		if err := at.Chown(name, f.header.Uid, f.header.Gid); err != nil {
			return err
		}
	}
	// The time first: a folder without permissions cannot be reached later.
	if err := at.Chtimes(name, time.Time{}, sane(f.header.ModTime)); err != nil {
		return err
	}
	return at.Chmod(name, u.mode(f.header, folderPerm))
}
