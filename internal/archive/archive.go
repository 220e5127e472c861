// Package archive packs files into tar streams and unpacks them, on both ends
// of a copy into or out of a sandbox.
//
// What Pack writes is a PAX archive, as pax(1) and GNU tar read it: permission
// bits with those of setuid, setgid and sticky, numeric owners, times to the
// nanosecond, symbolic and hard links, and holes (GNU sparse format 1.0).
// Extended attributes, access control lists, devices, sockets and pipes are
// not carried.
//
// What Unpack reads may come from an enemy. It writes below one os.Root alone,
// believes no size before it is paid for, and, unless told otherwise, neither
// goes through a link nor makes one that leads out of what it unpacks. What
// it does not do: decompress, or tell a person what was replaced.
package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
)

var (
	// ErrRefused is wrapped by errors about a stream that asks for what is not
	// done: a name or a link that leads out, a device, a folder turned into a
	// file.
	ErrRefused = errors.New("archive refused")
	// ErrLimit is wrapped by errors about a stream that is more than the limits
	// it was unpacked with.
	ErrLimit = errors.New("archive beyond its limits")
)

const (
	blockSize  = 512        // of tar
	bufferSize = 64 << 10   // of copying
	holeSize   = 4 << 10    // a run of zeros this long, and aligned, becomes a hole
	maxDepth   = 255        // folders within folders
	maxPath    = 64 << 10   // bytes of a name or of a link's target
	maxTrailer = 1 << 20    // bytes after an archive's end
	maxHeaders = 8 << 20    // bytes before an entry: each extension has at most 1 MiB
	maxLinks   = 16 << 10   // files with further names whose first is remembered
	maxFolders = 8 << 10    // folders whose modes and times are yet to be set
	maxExtents = 16 << 10   // pieces of a file between its holes
	clipAt     = 256        // bytes of a name in an error
	readdir    = 128        // names read at once
	implicit   = 0o755      // mode of a folder that no entry is about
	dataPerm   = 0o777      // bits that any file may have
	setIDPerm  = 0o7777     // bits that a file may have with SetID
	folderPerm = 0o1777     // bits that any folder may have
	tempPrefix = ".unpack-" // of files that are not complete
)

// clip makes a name of any length and content fit for an error.
func clip(name string) string {
	if len(name) > clipAt {
		return fmt.Sprintf("%q...", name[:clipAt])
	}
	return fmt.Sprintf("%q", name)
}

// meter reads until its context ends or its allowance is used up.
type meter struct {
	ctx  context.Context //nolint:containedctx // A Reader has no other way to it.
	in   io.Reader
	left int64
}

func (m *meter) Read(p []byte) (int, error) {
	if err := m.ctx.Err(); err != nil {
		return 0, err
	}
	if m.left <= 0 {
		return 0, fmt.Errorf("%w: more than %d bytes that are no file's", ErrLimit, maxHeaders)
	}
	n, err := m.in.Read(p[:min(int64(len(p)), m.left)])
	m.left -= int64(n)
	return n, err
}

// stopper writes until its context ends.
type stopper struct {
	ctx context.Context //nolint:containedctx // A Writer has no other way to it.
	out io.Writer
}

func (s *stopper) Write(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	return s.out.Write(p)
}
