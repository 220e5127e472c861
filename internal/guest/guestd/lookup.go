//go:build linux

package guestd

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

// defaultPath is searched where the environment has no PATH, as in Podman.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// lookup finds a program as execvp(3) would in a process with that working
// directory and environment. Its failures are those of a shell: NOT_FOUND (127)
// and DENIED (126).
func lookup(name, dir string, env []string) (string, error) {
	if strings.ContainsRune(name, 0) || name == "" {
		return "", failuref(guestv1.Failure_CODE_INVALID, "%q is no program", name)
	}
	if strings.Contains(name, "/") {
		return name, executable(absolute(name, dir), name)
	}
	path := variable(env, "PATH")
	if path == "" {
		path = defaultPath
	}
	var denied error
	for _, folder := range filepath.SplitList(path) {
		candidate := absolute(filepath.Join(folder, name), dir)
		err := executable(candidate, name)
		if err == nil {
			return candidate, nil
		}
		// A folder that may not be searched is as good as one without it.
		if errors.Is(err, errNoProgram) {
			denied = err
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", failuref(guestv1.Failure_CODE_NOT_FOUND, "%s: not found in PATH", name)
}

func absolute(path, dir string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

// errNoProgram is a file that nobody may run.
var errNoProgram = fmt.Errorf("not executable: %w", fs.ErrPermission)

// executable says why a file is no program. Whether this user may run it is
// for the kernel to say.
func executable(path, name string) error {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFREG || stat.Mode&0o111 == 0 {
		return fmt.Errorf("%s: %w", name, errNoProgram)
	}
	return nil
}

// startError is an error of fork or exec as the protocol has it.
func startError(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return failuref(guestv1.Failure_CODE_NOT_FOUND, "%v (or the interpreter that it names)", err)
	case errors.Is(err, unix.ENOEXEC), errors.Is(err, unix.EISDIR), errors.Is(err, unix.ETXTBSY), errors.Is(err, unix.ELIBBAD):
		return failuref(guestv1.Failure_CODE_DENIED, "%v", err)
	case errors.Is(err, unix.E2BIG), errors.Is(err, unix.EINVAL):
		return failuref(guestv1.Failure_CODE_INVALID, "%v", err)
	}
	return err
}

// checkDir says why a folder cannot be worked in.
func checkDir(dir string) error {
	var stat unix.Stat_t
	err := unix.Stat(dir, &stat)
	if err == nil && stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		err = unix.ENOTDIR
	}
	if err != nil {
		return fmt.Errorf("working directory %s: %w", dir, err)
	}
	return nil
}
