package process

import (
	"net"
	"sync"
)

// maxConsole is how much is kept of what a console said, in bytes.
const maxConsole = 1 << 20

// console is a shim's, for want of a machine that had one: what is typed is
// said, as a terminal echoes it, and that is all.
type console struct {
	mu    sync.Mutex
	said  []byte // the last of it
	end   int    // how much was said so far
	grown chan struct{}
}

func newConsole() *console {
	return &console{said: []byte("a console that echoes\n"), end: len("a console that echoes\n"), grown: make(chan struct{})}
}

func (c *console) say(text []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.said = append(c.said, text...)
	c.said = c.said[max(0, len(c.said)-maxConsole):]
	c.end += len(text)
	close(c.grown)
	c.grown = make(chan struct{})
}

// since returns what was said after the first n bytes, as far as it is kept.
func (c *console) since(n int) (news []byte, end int, grown <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	first := c.end - len(c.said)
	return append(news, c.said[max(0, n-first):]...), c.end, c.grown
}

// attach connects a person, until they leave.
func (c *console) attach(conn net.Conn) {
	left := make(chan struct{})
	go func() {
		defer close(left)
		typed := make([]byte, 4096)
		for {
			n, err := conn.Read(typed)
			if n > 0 {
				c.say(typed[:n])
			}
			if err != nil {
				return
			}
		}
	}()
	for seen := 0; ; {
		news, end, grown := c.since(seen)
		if _, err := conn.Write(news); err != nil {
			return
		}
		seen = end
		select {
		case <-grown:
		case <-left:
			return
		}
	}
}
