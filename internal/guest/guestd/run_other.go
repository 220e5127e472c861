//go:build !linux

package guestd

import (
	"fmt"
	"io"
)

// Run says that sandboxes run Linux.
func Run(_ []string, _, stderr io.Writer) int {
	fmt.Fprintln(stderr, "guestd: runs on Linux alone")
	return 1
}
