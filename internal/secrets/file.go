package secrets

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// access says who else may have access to a file for it to be read.
type access int

const (
	// private files are readable by their owner alone.
	private access = iota
	// credential files are systemd's: read-only, and for a service with a
	// User= owned by root with an access control list, whose mask is what
	// stat shows as the group's bits; see systemd.exec(5), "Credentials".
	credential
	// public files hold nothing that is secret by itself.
	public
)

// files reads files under rules.
type files struct {
	uid   uint32   // whose files may be read, beside root's
	roots []string // resolved; empty: anywhere
}

// read returns a file's content, or a problem. The file is opened first,
// without waiting and without following a link in its last element, and what
// was opened is judged: what is put in its place later is not what was read.
func (f files) read(path string, who access, limit int64) ([]byte, error) {
	if who == public {
		// These may well be links, into a store of configurations say.
		resolved, err := filepath.EvalSymlinks(path)
		if err != nil {
			return nil, systemProblem(path, err)
		}
		path = resolved
	}
	file, err := f.open(path, who)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, systemProblem(path, err)
	}
	if err := f.judge(path, info, who); err != nil {
		return nil, err
	}
	return readAll(file, path, limit)
}

func readAll(file io.Reader, path string, limit int64) ([]byte, error) {
	content, err := io.ReadAll(io.LimitReader(file, limit+1))
	switch {
	case err != nil:
		return nil, systemProblem(path, err)
	case int64(len(content)) > limit:
		clear(content)
		return nil, corruptf("%s is longer than %d bytes", path, limit)
	}
	return content, nil
}

func (f files) open(path string, who access) (*os.File, error) {
	dir, err := f.openDir(filepath.Dir(path), who)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	info, err := dir.Stat()
	if err != nil {
		return nil, systemProblem(path, err)
	}
	if who != public && info.Mode().Perm()&0o002 != 0 && info.Mode()&fs.ModeSticky == 0 {
		return nil, deniedf("everyone may put files into %s: chmod o-w %s", filepath.Dir(path), filepath.Dir(path))
	}
	flags := unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	fd, err := unix.Openat(int(dir.Fd()), filepath.Base(path), flags, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, deniedf("%s is a symbolic link; name the file itself", path)
	}
	if err != nil {
		return nil, systemProblem(path, &fs.PathError{Op: "open", Path: path, Err: err})
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openDir opens a folder. With roots, it is walked to from the root it is in,
// so that a link swapped in meanwhile cannot lead out.
func (f files) openDir(dir string, who access) (*os.File, error) {
	flags := os.O_RDONLY | unix.O_DIRECTORY | unix.O_NONBLOCK
	if len(f.roots) == 0 || who == credential {
		file, err := os.OpenFile(dir, flags, 0)
		if err != nil {
			return nil, systemProblem(dir, err)
		}
		return file, nil
	}
	resolved, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, systemProblem(dir, err)
	}
	at := slices.IndexFunc(f.roots, func(root string) bool { return inside(root, resolved) })
	if at < 0 {
		return nil, deniedf("%s is in none of the folders that this host allows secrets to be read from", dir)
	}
	root, err := os.OpenRoot(f.roots[at])
	if err != nil {
		return nil, systemProblem(f.roots[at], err)
	}
	defer root.Close()
	relative, err := filepath.Rel(f.roots[at], resolved)
	if err != nil {
		return nil, systemProblem(dir, err)
	}
	file, err := root.OpenFile(relative, flags, 0)
	if err != nil {
		return nil, systemProblem(dir, err)
	}
	return file, nil
}

func inside(root, dir string) bool {
	return dir == root || root == "/" || strings.HasPrefix(dir, root+"/")
}

// judge says what is wrong with an open file.
func (f files) judge(path string, info fs.FileInfo, who access) error {
	if !info.Mode().IsRegular() {
		return deniedf("%s is not a regular file", path)
	}
	if who == public {
		return nil
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return deniedf("%s has an owner that cannot be told", path)
	}
	if stat.Uid != f.uid && stat.Uid != 0 {
		return deniedf("%s belongs to user %d and not to the agent's (%d): chown it", path, stat.Uid, f.uid)
	}
	mode := info.Mode().Perm()
	switch {
	case who == credential && mode&0o137 != 0:
		return deniedf("%s has mode %04o; systemd makes credentials 0400 or 0440", path, mode)
	case who == private && mode&0o077 != 0:
		return deniedf("%s has mode %04o, so others have access: chmod 600 %s", path, mode, path)
	}
	return nil
}
