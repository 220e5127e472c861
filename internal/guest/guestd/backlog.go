//go:build linux

package guestd

import "github.com/choiros/agent/internal/guest/wire"

const (
	// maxBacklog is how much is kept of what nobody was attached to read, in
	// bytes.
	maxBacklog = 64 << 10
	// maxPieces is in how many pieces.
	maxPieces = 1024
)

// backlog keeps the last of an exec's output, in the order in which it came.
// The zero value is empty.
type backlog struct {
	pieces []piece
	size   int
}

// piece is output of one kind.
type piece struct {
	kind wire.Kind
	data []byte
}

// add keeps a copy of data, and drops of the oldest what is then too much.
func (b *backlog) add(kind wire.Kind, data []byte) {
	if len(data) > maxBacklog {
		data = data[len(data)-maxBacklog:]
	}
	if last := len(b.pieces) - 1; last >= 0 && b.pieces[last].kind == kind {
		b.pieces[last].data = append(b.pieces[last].data, data...)
	} else {
		b.pieces = append(b.pieces, piece{kind, append([]byte(nil), data...)})
	}
	b.size += len(data)
	for b.size > maxBacklog || len(b.pieces) > maxPieces {
		b.dropOldest()
	}
}

func (b *backlog) dropOldest() {
	oldest := &b.pieces[0]
	if excess := b.size - maxBacklog; excess > 0 && excess < len(oldest.data) {
		oldest.data = oldest.data[excess:]
		b.size -= excess
		return
	}
	b.size -= len(oldest.data)
	oldest.data = nil
	b.pieces = b.pieces[1:]
}

// take returns what is kept, and empties it.
func (b *backlog) take() []piece {
	pieces := b.pieces
	*b = backlog{}
	return pieces
}
