package forward

import "sync"

// bufferSize also holds any datagram.
const bufferSize = 64 << 10

// maxPipes bounds pipes that are in use, and those that wait for use.
const maxPipes = 64

// buffers lends buffers and pipes to who has something to carry just now.
type buffers struct {
	pool sync.Pool

	mu    sync.Mutex
	pipes []*pipe // those that wait
	made  int
}

func newBuffers() *buffers {
	return &buffers{pool: sync.Pool{New: func() any {
		buf := make([]byte, bufferSize)
		return &buf
	}}}
}

func (b *buffers) get() *[]byte { return b.pool.Get().(*[]byte) }

func (b *buffers) put(buf *[]byte) { b.pool.Put(buf) }

// getPipe returns an empty pipe, or nil if there is none to be had.
func (b *buffers) getPipe() *pipe {
	b.mu.Lock()
	if n := len(b.pipes); n > 0 {
		p := b.pipes[n-1]
		b.pipes = b.pipes[:n-1]
		b.mu.Unlock()
		return p
	}
	if b.made >= maxPipes {
		b.mu.Unlock()
		return nil
	}
	b.made++
	b.mu.Unlock()
	p := newPipe()
	if p == nil {
		b.mu.Lock()
		b.made--
		b.mu.Unlock()
	}
	return p
}

// putPipe takes a pipe back. One that is not empty is closed.
func (b *buffers) putPipe(p *pipe) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p.n == 0 {
		b.pipes = append(b.pipes, p)
		return
	}
	b.made--
	p.close()
}

// close closes the pipes; none is lent any more.
func (b *buffers) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range b.pipes {
		p.close()
	}
	b.pipes = nil
}
