package vm

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxConsole is how much of what a console says is kept, in bytes. When it is
// reached the file begins anew, and the part before is kept once.
const maxConsole = 1 << 20

// console is the host's end of a machine's console: it keeps what is said in a
// file, and lets people watch and type.
type console struct {
	theirs *os.File // the machine's end
	ours   *os.File
	path   string
	done   chan struct{}

	mu       sync.Mutex
	log      *os.File
	size     int
	watchers map[*net.UnixConn]chan []byte
}

// openConsole makes a console that is logged to a file, begun anew.
func openConsole(path string) (*console, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	for _, fd := range pair {
		unix.CloseOnExec(fd)
	}
	_ = unix.SetNonblock(pair[0], true)
	c := &console{
		ours: os.NewFile(uintptr(pair[0]), "console"), theirs: os.NewFile(uintptr(pair[1]), "console"),
		path: path, done: make(chan struct{}), watchers: map[*net.UnixConn]chan []byte{},
	}
	if err := c.reopen(); err != nil {
		c.ours.Close()
		c.theirs.Close()
		return nil, err
	}
	go c.read()
	return c, nil
}

func (c *console) reopen() error {
	log, err := os.OpenFile(c.path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	c.log, c.size = log, 0
	return nil
}

// read takes all that the machine says, for as long as it does.
func (c *console) read() {
	defer close(c.done)
	chunk := make([]byte, 4096)
	for {
		n, err := c.ours.Read(chunk)
		if n > 0 {
			c.hear(chunk[:n])
		}
		if err != nil {
			return
		}
	}
}

// hear keeps what was said and shows it to who watches. Whoever is too slow to
// read it loses it.
func (c *console) hear(said []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.size+len(said) > maxConsole {
		c.log.Close()
		_ = os.Rename(c.path, c.path+".1")
		if c.reopen() != nil {
			return
		}
	}
	n, _ := c.log.Write(said)
	c.size += n
	for _, watcher := range c.watchers {
		select {
		case watcher <- append([]byte(nil), said...):
		default:
		}
	}
}

// attach connects a person to the console until they leave or it ends. What
// was said last comes first.
func (c *console) attach(conn *net.UnixConn) {
	defer conn.Close()
	said := make(chan []byte, 64)
	c.mu.Lock()
	before, err := os.ReadFile(c.path)
	if err == nil {
		c.watchers[conn] = said
	}
	c.mu.Unlock()
	if err != nil {
		answerError(conn, err)
		return
	}
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.watchers, conn)
	}()
	if _, err := conn.Write(append([]byte{answerStream}, before...)); err != nil {
		return
	}
	typed := make(chan struct{})
	go func() {
		defer close(typed)
		_, _ = io.Copy(c.ours, conn)
	}()
	for {
		select {
		case chunk := <-said:
			if _, err := conn.Write(chunk); err != nil {
				return
			}
		case <-typed:
			return
		case <-c.done:
			return
		}
	}
}

// drain returns once all was read that the machine has said, which has ended.
func (c *console) drain() {
	c.theirs.Close()
	select {
	case <-c.done:
	case <-time.After(lastWordLimit): // somebody has its end all the same
		c.ours.Close()
		<-c.done
	}
}

// close ends the console once the machine has.
func (c *console) close() {
	c.drain()
	c.ours.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.log.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return
	}
}

// maxLastWords is how much of the end of a console is looked at, in bytes, for
// what kernels can outlive.
const maxLastWords = 8 << 10

// lastWords is the line that says most about why a machine has ended: that of
// the kernel's panic or restart, which another boot may have followed, or of
// guestd's trouble, or else the last.
func (c *console) lastWords() string {
	c.drain()
	said, err := os.ReadFile(c.path)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(said)) {
		if strings.Contains(line, "Kernel panic") || strings.Contains(line, "reboot: Restarting system") {
			return strings.TrimSpace(printable(line))
		}
	}
	last := ""
	for line := range strings.Lines(string(said[max(0, len(said)-maxLastWords):])) {
		line = strings.TrimSpace(printable(line))
		if strings.Contains(line, "guestd: ") {
			return line
		}
		if line != "" {
			last = line
		}
	}
	return last
}
