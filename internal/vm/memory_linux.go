package vm

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// checkMemoryBacked refuses a folder that is on a disk.
func checkMemoryBacked(dir string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return err
	}
	if fs.Type != unix.TMPFS_MAGIC && fs.Type != unix.RAMFS_MAGIC {
		return fmt.Errorf("%w: %s, for its key, is not on a tmpfs; set XDG_RUNTIME_DIR to a folder that is", ErrCannotSave, dir)
	}
	return nil
}
