//go:build !linux

package vm

import "fmt"

// checkMemoryBacked refuses every folder: there is no file system in memory.
func checkMemoryBacked(dir string) error {
	return fmt.Errorf("%w: %s, for its key, is on a disk", ErrCannotSave, dir)
}
