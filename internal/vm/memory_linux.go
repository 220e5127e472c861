package vm

import (
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// checkKeyDir refuses a folder for keys that is on a disk, or would be.
func checkKeyDir(dir string) error {
	if dir == "" {
		return fmt.Errorf("%w: there is no folder in memory for its key; set XDG_RUNTIME_DIR", ErrCannotSave)
	}
	var fs unix.Statfs_t
	err := unix.Statfs(dir, &fs)
	for at := dir; errors.Is(err, unix.ENOENT) && at != filepath.Dir(at); {
		at = filepath.Dir(at)
		err = unix.Statfs(at, &fs)
	}
	if err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	if fs.Type != unix.TMPFS_MAGIC && fs.Type != unix.RAMFS_MAGIC {
		return fmt.Errorf("%w: %s, for its key, is not on a tmpfs; set XDG_RUNTIME_DIR to a folder that is", ErrCannotSave, dir)
	}
	return nil
}
