//go:build linux

package guestd

import (
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/guest/wire"
)

// What may still come after a command has ended. All that it printed itself
// lies in pipes by then and is read whatever it takes; a process that it left
// behind and that shares them is given time to say its last words, but not to
// keep its end from being told.
const (
	// lastWords is how long nothing may come before that is all.
	lastWords = 100 * time.Millisecond
	// maxLastWords ends a stream that does not pause, once more was read than
	// a pipe holds.
	maxLastWords = time.Second
	maxPipe      = 1 << 20
)

// drain carries what a command prints to the end of it.
type drain struct {
	buffers *sync.Pool              // of *[]byte
	take    func(wire.Kind, []byte) // is given what is printed
	exited  chan struct{}           // closed when the command has ended; then is set:
	ended   time.Time
}

// newBuffers returns what drains share.
func newBuffers() *sync.Pool {
	return &sync.Pool{New: func() any {
		buffer := make([]byte, wire.ChunkSize)
		return &buffer
	}}
}

// end notes that the command, which printed to the other ends of these, has
// ended. A nil file is none.
func (d *drain) end(files ...*os.File) {
	d.ended = time.Now()
	close(d.exited)
	for _, file := range files {
		if file != nil {
			_ = file.SetReadDeadline(d.ended.Add(lastWords))
		}
	}
}

// pump carries one stream to its end.
func (d *drain) pump(kind wire.Kind, file *os.File) {
	raw, err := file.SyscallConn()
	if err != nil {
		return
	}
	after := 0 // bytes since the command ended
	for {
		n, err := d.carry(kind, raw.Read)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			// What lies in the pipe was printed before; it is not waited for.
			n, err = d.carry(kind, func(read func(uintptr) bool) error {
				return raw.Control(func(fd uintptr) { read(fd) })
			})
		}
		if n <= 0 || err != nil {
			return
		}
		select {
		case <-d.exited:
			if after += n; after > maxPipe && time.Since(d.ended) > maxLastWords {
				return
			}
			_ = file.SetReadDeadline(time.Now().Add(lastWords))
		default:
		}
	}
}

// carry waits for output and delivers it. Only then does it take a buffer, for
// most execs most of the time have nothing to say.
func (d *drain) carry(kind wire.Kind, read func(func(uintptr) bool) error) (int, error) {
	n := 0
	var buffer *[]byte
	var readErr error
	err := read(func(fd uintptr) bool {
		buffer, _ = d.buffers.Get().(*[]byte)
		n, readErr = unix.Read(int(fd), *buffer)
		if errors.Is(readErr, unix.EAGAIN) || errors.Is(readErr, unix.EINTR) {
			d.buffers.Put(buffer)
			buffer, n = nil, 0
			return false
		}
		return true
	})
	if buffer != nil {
		defer d.buffers.Put(buffer)
	}
	if err = errors.Join(err, readErr); err != nil || n <= 0 {
		return 0, err
	}
	d.take(kind, (*buffer)[:n])
	return n, nil
}
