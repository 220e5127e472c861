//go:build linux

package vhost

import "encoding/binary"

// headerSize is the length of a packet's header, in bytes.
const headerSize = 44

// hostCID is the host's address.
const hostCID = 2

// typeStream is the type of all connections here.
const typeStream = 1

// Operations of packets.
const (
	opRequest       = 1
	opResponse      = 2
	opReset         = 3
	opShutdown      = 4
	opData          = 5
	opCreditUpdate  = 6
	opCreditRequest = 7
)

// Flags of opShutdown: what its sender will not do any more.
const (
	shutReceive = 1
	shutSend    = 2
	shutBoth    = shutReceive | shutSend
)

// key names a connection: the ports of its ends.
type key struct{ guest, host uint32 }

// header is a packet's (virtio 5.10.6).
type header struct {
	sourceCID, targetCID   uint64
	sourcePort, targetPort uint32
	length                 uint32
	kind, op               uint16
	flags                  uint32
	// room is how much its sender takes in all, and taken how much it has
	// taken from it, since the beginning and modulo 1<<32.
	room, taken uint32
}

func (h header) put(to []byte) {
	binary.LittleEndian.PutUint64(to[0:], h.sourceCID)
	binary.LittleEndian.PutUint64(to[8:], h.targetCID)
	binary.LittleEndian.PutUint32(to[16:], h.sourcePort)
	binary.LittleEndian.PutUint32(to[20:], h.targetPort)
	binary.LittleEndian.PutUint32(to[24:], h.length)
	binary.LittleEndian.PutUint16(to[28:], h.kind)
	binary.LittleEndian.PutUint16(to[30:], h.op)
	binary.LittleEndian.PutUint32(to[32:], h.flags)
	binary.LittleEndian.PutUint32(to[36:], h.room)
	binary.LittleEndian.PutUint32(to[40:], h.taken)
}

func parseHeader(b []byte) header {
	return header{
		sourceCID: binary.LittleEndian.Uint64(b[0:]), targetCID: binary.LittleEndian.Uint64(b[8:]),
		sourcePort: binary.LittleEndian.Uint32(b[16:]), targetPort: binary.LittleEndian.Uint32(b[20:]),
		length: binary.LittleEndian.Uint32(b[24:]),
		kind:   binary.LittleEndian.Uint16(b[28:]), op: binary.LittleEndian.Uint16(b[30:]),
		flags: binary.LittleEndian.Uint32(b[32:]),
		room:  binary.LittleEndian.Uint32(b[36:]), taken: binary.LittleEndian.Uint32(b[40:]),
	}
}

// gather copies from pieces, and returns what it did not need of them.
func gather(to []byte, pieces [][]byte) (n int, rest [][]byte) {
	for _, piece := range pieces {
		n += copy(to[n:], piece)
	}
	return n, skip(pieces, n)
}

// scatter copies into pieces, and returns what of them is left.
func scatter(pieces [][]byte, from []byte) (rest [][]byte) {
	n := 0
	for _, piece := range pieces {
		n += copy(piece, from[n:])
	}
	return skip(pieces, n)
}

// skip leaves out the first n bytes of pieces.
func skip(pieces [][]byte, n int) [][]byte {
	for len(pieces) > 0 && n >= len(pieces[0]) {
		n -= len(pieces[0])
		pieces = pieces[1:]
	}
	if n > 0 {
		pieces[0] = pieces[0][n:]
	}
	return pieces
}

func size(pieces [][]byte) int {
	n := 0
	for _, piece := range pieces {
		n += len(piece)
	}
	return n
}

// cut shortens pieces to n bytes, and reports whether they had as many.
func cut(pieces [][]byte, n int) ([][]byte, bool) {
	for i, piece := range pieces {
		if n <= len(piece) {
			pieces[i] = piece[:n]
			return pieces[:i+1], true
		}
		n -= len(piece)
	}
	return pieces, n == 0
}
