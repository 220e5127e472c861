package image

import "io"

const (
	aheadBuffers = 4
	aheadSize    = 512 << 10
)

// ahead reads from another reader before it is asked to, in a goroutine of its
// own, so that unpacking a layer and taking in what is in it go side by side.
// It must be closed.
type ahead struct {
	full  chan []byte // closed once err is set
	empty chan []byte
	stop  chan struct{}
	err   error // that ended it; the reader's

	buffer []byte // that is being read from
	left   []byte // what is yet to be read of it
}

func readAhead(r io.Reader) *ahead {
	a := &ahead{full: make(chan []byte, aheadBuffers), empty: make(chan []byte, aheadBuffers), stop: make(chan struct{})}
	for range aheadBuffers {
		a.empty <- make([]byte, aheadSize)
	}
	go a.run(r)
	return a
}

// run reads until there is an error, the end being one, or until it is stopped.
func (a *ahead) run(r io.Reader) {
	defer close(a.full)
	for a.err == nil {
		select {
		case <-a.stop:
			return
		case buffer := <-a.empty:
			n := 0
			for n < len(buffer) && a.err == nil {
				var more int
				more, a.err = r.Read(buffer[n:])
				n += more
			}
			a.full <- buffer[:n] // there is room for all buffers
		}
	}
}

// Read implements io.Reader.
func (a *ahead) Read(p []byte) (int, error) {
	for len(a.left) == 0 {
		if a.buffer != nil {
			a.empty <- a.buffer[:aheadSize]
			a.buffer = nil
		}
		next, ok := <-a.full
		if !ok {
			return 0, a.err
		}
		a.buffer, a.left = next, next
	}
	n := copy(p, a.left)
	a.left = a.left[n:]
	return n, nil
}

// close ends the reading, and returns once nothing is read any more. After it
// nothing may be read.
func (a *ahead) close() {
	close(a.stop)
	for range a.full {
	}
}
