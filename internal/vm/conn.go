package vm

import (
	"io"
	"net"
)

// closeWriter is a connection of which one direction can end before the other.
type closeWriter interface {
	net.Conn
	CloseWrite() error
}

// relay carries bytes between two connections until both directions have
// ended, or one has failed, and closes both. An end is passed on.
func relay(a, b net.Conn) {
	defer a.Close()
	defer b.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		carry(a, b)
	}()
	carry(b, a)
	<-done
}

func carry(to, from net.Conn) {
	_, err := io.Copy(to, from)
	w, ok := to.(closeWriter)
	if err != nil || !ok || w.CloseWrite() != nil {
		// Nothing more will come of it: the other direction is to end, too.
		to.Close()
		from.Close()
	}
}
