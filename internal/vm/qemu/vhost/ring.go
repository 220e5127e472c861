//go:build linux

package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"
)

// maxRing is the most descriptors of a ring, by virtio's own limit.
const maxRing = 1 << 15

// Flags of descriptors, of what is available, and of what is used.
const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4

	availQuiet = 1 // VIRTQ_AVAIL_F_NO_INTERRUPT
	usedQuiet  = 1 // VIRTQ_USED_F_NO_NOTIFY
)

// errRing is a driver that does not keep to the protocol.
var errRing = errors.New("the guest's vsock driver has broken a ring")

// ring is a split virtqueue, without event indices: each side says by a flag
// whether it wants to be woken. That flag and the index beside it are one word,
// so that all that both sides see change is read and written as words.
type ring struct {
	size              uint16
	descAt, availAt   uint64 // in QEMU's address space
	usedAt            uint64
	kick, call        *os.File // the guest's and ours
	enabled           bool
	next              uint16 // what the guest makes available next
	done              uint16 // how many were given back
	quiet             bool   // the guest need not wake us
	desc, avail, used []byte // while it runs
	given             bool   // back, since the guest was woken
}

// chain is a buffer of the guest's. It is good until the next is taken.
type chain struct {
	head uint16
	// read are the guest's bytes for us, write is the room for ours.
	read, write [][]byte
}

func (r *ring) running() bool { return r.desc != nil }

// start finds the ring in memory, if it is to run.
func (r *ring) start(m memory) error {
	r.desc, r.avail, r.used = nil, nil, nil
	if r.kick == nil || !r.enabled || r.size == 0 || r.usedAt == 0 {
		return nil
	}
	n := uint64(r.size)
	desc, avail, used := m.atFront(r.descAt, 16*n), m.atFront(r.availAt, 4+2*n), m.atFront(r.usedAt, 4+8*n)
	switch {
	case desc == nil || avail == nil || used == nil:
		return fmt.Errorf("%w: it is not in its memory", errRing)
	case !wordAligned(avail) || !wordAligned(used):
		return fmt.Errorf("%w: it is not aligned", errRing)
	}
	r.desc, r.avail, r.used = desc, avail, used
	r.done = uint16(atomic.LoadUint32(word(used)) >> 16) //nolint:gosec // The upper half.
	r.publish()
	return nil
}

// stop ends it until its descriptors are given anew.
func (r *ring) stop() {
	if r.running() {
		r.publish()
		r.wake()
	}
	r.desc, r.avail, r.used = nil, nil, nil
	closeFile(&r.kick)
	closeFile(&r.call)
}

func closeFile(file **os.File) {
	if *file != nil {
		(*file).Close()
		*file = nil
	}
}

func word(b []byte) *uint32 { return (*uint32)(unsafe.Pointer(unsafe.SliceData(b))) }

func wordAligned(b []byte) bool { return uintptr(unsafe.Pointer(unsafe.SliceData(b)))%4 == 0 }

// waiting is how many chains can be taken.
func (r *ring) waiting() (int, error) {
	if !r.running() {
		return 0, nil
	}
	n := uint16(atomic.LoadUint32(word(r.avail))>>16) - r.next //nolint:gosec // The upper half.
	if n > r.size {
		return 0, fmt.Errorf("%w: %d available of %d", errRing, n, r.size)
	}
	return int(n), nil
}

// take takes the next chain into c, and reports whether there is one.
func (r *ring) take(m memory, c *chain) (bool, error) {
	if n, err := r.waiting(); n == 0 || err != nil {
		return false, err
	}
	c.read, c.write = c.read[:0], c.write[:0]
	c.head = binary.LittleEndian.Uint16(r.avail[4+2*(r.next%r.size):])
	r.next++
	at, left := c.head, r.size
	for {
		if at >= r.size || left == 0 {
			return false, fmt.Errorf("%w: a chain without an end", errRing)
		}
		left--
		// Once, and from a copy: the guest may be writing there.
		var d [16]byte
		copy(d[:], r.desc[16*int(at):])
		flags := binary.LittleEndian.Uint16(d[12:])
		piece := m.atGuest(binary.LittleEndian.Uint64(d[:]), uint64(binary.LittleEndian.Uint32(d[8:])))
		if piece == nil || flags&descIndirect != 0 {
			return false, fmt.Errorf("%w: a descriptor of what is not memory", errRing)
		}
		if flags&descWrite != 0 {
			c.write = append(c.write, piece)
		} else {
			c.read = append(c.read, piece)
		}
		if flags&descNext == 0 {
			return true, nil
		}
		at = binary.LittleEndian.Uint16(d[14:])
	}
}

// give gives a chain back, into which n bytes were written. publish shows it.
func (r *ring) give(head uint16, n int) {
	at := 4 + 8*int(r.done%r.size)
	binary.LittleEndian.PutUint32(r.used[at:], uint32(head))
	binary.LittleEndian.PutUint32(r.used[at+4:], uint32(n)) //nolint:gosec // Not above a chain's length.
	r.done++
	r.given = true
}

// hush says whether the guest is to wake us when it makes something available.
func (r *ring) hush(quiet bool) {
	r.quiet = quiet
	if r.running() {
		r.publish()
	}
}

func (r *ring) publish() {
	var flags uint32
	if r.quiet {
		flags = usedQuiet
	}
	atomic.StoreUint32(word(r.used), flags|uint32(r.done)<<16)
}

// wake tells the guest of what was given back, unless it looks for itself.
func (r *ring) wake() {
	if !r.given || !r.running() {
		return
	}
	r.given = false
	if r.call != nil && atomic.LoadUint32(word(r.avail))&availQuiet == 0 {
		_, _ = r.call.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0}) // QEMU may have closed it meanwhile
	}
}
