//go:build linux

package vhost

import (
	"encoding/binary"
	"testing"
	"time"
)

// FuzzGuest has a guest write what it likes into its rings and packets. Whatever
// that is, the device goes on or ends, and touches nothing but its memory.
func FuzzGuest(f *testing.F) {
	packet := func(k key, op uint16, payload string) []byte {
		h := of(k, op)
		h.sourceCID, h.targetCID, h.kind, h.length = guestCID, hostCID, typeStream, uint32(len(payload))
		b := make([]byte, headerSize)
		h.put(b)
		return append(b, payload...)
	}
	f.Add([]byte{0, 0}, packet(key{1, 1025}, opRequest, ""))
	f.Add([]byte{0, 1, 2}, append(packet(key{1, 1025}, opRequest, ""), packet(key{1, 1025}, opData, "hello")...))
	f.Add([]byte{1, 255, 9, 0}, packet(key{7, 1 << 30}, opShutdown, ""))
	f.Fuzz(func(t *testing.T, shape, content []byte) {
		g := newGuest(t)
		g.setUp()
		listener, err := g.device.Listen(1025)
		g.must(err)
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				conn.Close()
			}
		}()
		r := &g.rings[fromGuest]
		copy(g.memory[r.buffers:r.buffers+packetSize], content)
		copy(g.memory[g.rings[toGuest].buffers:], content)
		// Each byte of shape is a descriptor, somewhere in the content or just
		// outside of memory, which is offered if it is odd.
		for i, b := range shape[:min(len(shape), ringSize)] {
			at := uint64(r.buffers + int(b>>2)*headerSize)
			size, flags := headerSize+int(b&15), 0
			switch b >> 5 {
			case 1:
				flags, size = descNext, 20
			case 2:
				at = memorySize - uint64(b)
			case 3:
				flags = descWrite
			case 4:
				flags = int(b)
			}
			g.describe(r, i, at, size, flags, i+1)
			if b&1 == 1 || i == 0 {
				g.offer(r, uint16(i))
			}
		}
		if len(shape) > 2 && shape[0] > 250 {
			binary.LittleEndian.PutUint16(g.memory[r.avail+2:], uint16(shape[1])<<8)
			_, _ = r.kick.Write(words64(1))
		}
		g.receiveOrNot(time.Millisecond)
		_ = g.unplug() // which may have happened
	})
}

// receiveOrNot waits for a packet of any kind, or for none.
func (g *guest) receiveOrNot(limit time.Duration) {
	g.used(&g.rings[toGuest], limit)
}
