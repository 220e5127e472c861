//go:build linux

package vhost

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long anything here may take.
const patience = 20 * time.Second

const (
	memorySize = 8 << 20
	ringSize   = 32
	guestBase  = 0x40000000     // where the guest has its memory
	frontBase  = 0x7f0000000000 // and where QEMU has it
	guestCID   = 3
	bufferSize = 4 << 10  // of what is received
	packetSize = 64 << 10 // of what is sent
)

// guest is the other side of a Device: QEMU and a guest's driver.
type guest struct {
	*testing.T
	device *Device
	served chan error
	front  *net.UnixConn
	file   *os.File
	memory []byte
	rings  [2]driverRing
}

// driverRing is a ring as the guest has it.
type driverRing struct {
	desc, avail, used int // in memory
	buffers           int
	next, seen        uint16
	base              uint16 // that the device has said
	kick, call        *os.File
}

func newGuest(t *testing.T) *guest {
	t.Helper()
	g := &guest{T: t, device: New(guestCID), served: make(chan error, 1)}
	t.Cleanup(g.device.Close)
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	g.must(err)
	g.file = os.NewFile(uintptr(fd), "guest")
	t.Cleanup(func() { g.file.Close() })
	g.must(g.file.Truncate(memorySize))
	g.memory, err = unix.Mmap(fd, 0, memorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	g.must(err)
	t.Cleanup(func() { g.must(unix.Munmap(g.memory)) })
	at := 0
	for i := range g.rings {
		r := &g.rings[i]
		r.desc, r.avail, r.used, r.buffers = at, at+0x1000, at+0x2000, at+0x10000
		at += memorySize / 2
		for _, event := range []**os.File{&r.kick, &r.call} {
			fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
			g.must(err)
			*event = os.NewFile(uintptr(fd), "event")
			file := *event
			t.Cleanup(func() { file.Close() })
		}
	}
	g.plug()
	return g
}

func (g *guest) must(err error) {
	g.Helper()
	if err != nil {
		g.Fatal(err)
	}
}

// plug connects QEMU to the device.
func (g *guest) plug() {
	g.Helper()
	ours, theirs, err := pair()
	g.must(err)
	g.front = ours
	go func() { g.served <- g.device.Serve(theirs) }()
	g.Cleanup(func() { ours.Close() })
}

// unplug hangs up, and returns what Serve does.
func (g *guest) unplug() error {
	g.Helper()
	g.front.Close()
	return g.ends()
}

func (g *guest) ends() error {
	g.Helper()
	select {
	case err := <-g.served:
		return err
	case <-time.After(patience):
		g.Fatal("Serve goes on")
		return nil
	}
}

// tell sends a message of vhost-user's, and awaits that it is acknowledged.
func (g *guest) tell(request uint32, payload []byte, files ...*os.File) error {
	reply, err := g.exchange(request, payload, files...)
	if err == nil && (len(reply) != 8 || binary.LittleEndian.Uint64(reply) != 0) {
		err = errors.New("not acknowledged")
	}
	return err
}

func (g *guest) exchange(request uint32, payload []byte, files ...*os.File) ([]byte, error) {
	var fds []int
	for _, file := range files {
		raw, err := file.SyscallConn()
		g.must(err)
		g.must(raw.Control(func(fd uintptr) { fds = append(fds, int(fd)) }))
	}
	head := words32(request, versionOne|wantsReply, uint32(len(payload)))
	if _, _, err := g.front.WriteMsgUnix(append(head, payload...), unix.UnixRights(fds...), nil); err != nil {
		return nil, err
	}
	_ = g.front.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.ReadFull(g.front, head); err != nil {
		return nil, err
	}
	reply := make([]byte, binary.LittleEndian.Uint32(head[8:]))
	_, err := io.ReadFull(g.front, reply)
	return reply, err
}

func words32(words ...uint32) []byte {
	var b []byte
	for _, w := range words {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	return b
}

func words64(words ...uint64) []byte {
	var b []byte
	for _, w := range words {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	return b
}

// setUp is what QEMU does as the guest's driver has made its rings.
func (g *guest) setUp() {
	g.Helper()
	if _, err := g.exchange(getProtocolFeatures, nil); err != nil {
		g.Fatal(err)
	}
	// From here on everything is acknowledged.
	g.must(g.tell(setProtocolFeatures, words64(protocolReplyAck|protocolConfig)))
	g.must(g.tell(setOwner, nil))
	g.must(g.tell(setFeatures, words64(featureVersion1|featureProtocol)))
	g.shareMemory()
	rx := &g.rings[toGuest]
	for i := range ringSize {
		g.describe(rx, i, uint64(rx.buffers+i*bufferSize), bufferSize, descWrite, 0)
		g.offer(rx, uint16(i))
	}
	g.resume()
}

func (g *guest) shareMemory() {
	g.Helper()
	g.must(g.tell(setMemTable, append(words32(1, 0), words64(guestBase, memorySize, frontBase, 0)...), g.file))
}

// pause and resume are what QEMU does as the machine is paused, and goes on.
func (g *guest) pause() {
	g.Helper()
	for i := range g.rings {
		g.must(g.tell(setVringEnable, words32(uint32(i), 0)))
	}
	for i := range g.rings {
		reply, err := g.exchange(getVringBase, words32(uint32(i), 0))
		g.must(err)
		g.rings[i].base = uint16(binary.LittleEndian.Uint32(reply[4:]))
	}
}

func (g *guest) resume() {
	g.Helper()
	for i := range g.rings {
		r, index := &g.rings[i], uint32(i)
		g.must(g.tell(setVringNum, words32(index, ringSize)))
		g.must(g.tell(setVringBase, words32(index, uint32(r.base))))
		g.must(g.tell(setVringAddr, append(words32(index, 0),
			words64(frontBase+uint64(r.desc), frontBase+uint64(r.used), frontBase+uint64(r.avail), 0)...)))
		g.must(g.tell(setVringKick, words64(uint64(i)), r.kick))
		g.must(g.tell(setVringCall, words64(uint64(i)), r.call))
	}
	for i := range g.rings {
		g.must(g.tell(setVringEnable, words32(uint32(i), 1)))
	}
}

func (g *guest) describe(r *driverRing, i int, at uint64, size, flags, next int) {
	d := g.memory[r.desc+16*i:]
	binary.LittleEndian.PutUint64(d, guestBase+at)
	binary.LittleEndian.PutUint32(d[8:], uint32(size))
	binary.LittleEndian.PutUint16(d[12:], uint16(flags))
	binary.LittleEndian.PutUint16(d[14:], uint16(next))
}

// offer makes a chain available.
func (g *guest) offer(r *driverRing, head uint16) {
	binary.LittleEndian.PutUint16(g.memory[r.avail+4+2*int(r.next%ringSize):], head)
	r.next++
	atomic.StoreUint32(word(g.memory[r.avail:]), uint32(r.next)<<16)
	if atomic.LoadUint32(word(g.memory[r.used:]))&usedQuiet == 0 {
		_, _ = r.kick.Write(words64(1))
	}
}

// used waits for the next chain that the device has given back. It looks when it
// is woken, and not before.
func (g *guest) used(r *driverRing, limit time.Duration) (head, n int, ok bool) {
	g.Helper()
	g.must(r.call.SetReadDeadline(time.Now().Add(limit)))
	for {
		if uint16(atomic.LoadUint32(word(g.memory[r.used:]))>>16) != r.seen {
			at := g.memory[r.used+4+8*int(r.seen%ringSize):]
			r.seen++
			return int(binary.LittleEndian.Uint32(at)), int(binary.LittleEndian.Uint32(at[4:])), true
		}
		if _, err := r.call.Read(make([]byte, 8)); err != nil {
			return 0, 0, false
		}
	}
}

// heard waits until the device has handled all that was sent.
func (g *guest) heard() {
	g.Helper()
	for r := &g.rings[fromGuest]; r.seen != r.next; {
		if _, _, ok := g.used(r, patience); !ok {
			g.Fatal("the device takes nothing from the guest")
		}
	}
}

// send sends a packet. Its header is a descriptor, and its payload are two.
func (g *guest) send(h header, payload string) {
	g.Helper()
	r := &g.rings[fromGuest]
	slots := ringSize / 4
	if int(r.next-r.seen) == slots {
		if _, _, ok := g.used(r, patience); !ok {
			g.Error("the device takes nothing from the guest")
			return
		}
	}
	i := int(r.next) % slots
	at := r.buffers + i*(packetSize+64)
	h.sourceCID, h.targetCID = guestCID, hostCID
	if h.kind == 0 {
		h.kind = typeStream
	}
	if h.length == 0 {
		h.length = uint32(len(payload))
	}
	h.put(g.memory[at:])
	half := len(payload) / 2
	copy(g.memory[at+headerSize:], payload)
	if payload == "" {
		g.describe(r, 4*i, uint64(at), headerSize, 0, 0)
	} else {
		g.describe(r, 4*i, uint64(at), headerSize, descNext, 4*i+1)
		g.describe(r, 4*i+1, uint64(at+headerSize), half, descNext, 4*i+2)
		g.describe(r, 4*i+2, uint64(at+headerSize+half), len(payload)-half, 0, 0)
	}
	g.offer(r, uint16(4*i))
}

// receive waits for a packet of the device's.
func (g *guest) receive() (header, string) {
	g.Helper()
	h, payload, ok := g.receiveFor(patience)
	if !ok {
		g.Fatal("the device sends nothing")
	}
	return h, payload
}

func (g *guest) receiveFor(limit time.Duration) (h header, payload string, ok bool) {
	g.Helper()
	r := &g.rings[toGuest]
	head, n, ok := g.used(r, limit)
	if !ok {
		return h, "", false
	}
	at := r.buffers + head*bufferSize
	h = parseHeader(g.memory[at:])
	if n < headerSize || n > bufferSize || int(h.length) != n-headerSize || h.sourceCID != hostCID || h.targetCID != guestCID {
		g.Fatalf("%d bytes, %+v", n, h)
	}
	payload = string(g.memory[at+headerSize : at+n])
	g.offer(r, uint16(head))
	return h, payload, true
}

// wants waits for a packet of a connection, without payload.
func (g *guest) wants(op uint16, k key) header {
	g.Helper()
	h, payload := g.receive()
	if h.op != op || payload != "" || h.sourcePort != k.host || h.targetPort != k.guest || h.kind != typeStream {
		g.Fatalf("%+v with %q; want operation %d of %+v", h, payload, op, k)
	}
	return h
}

// of is a header of the guest's for a connection that takes any amount.
func of(k key, op uint16) header {
	return header{sourcePort: k.guest, targetPort: k.host, op: op, room: 1 << 30}
}

// dialled is a connection of the host's to port 7.
func (g *guest) dialled() (*net.UnixConn, key) {
	g.Helper()
	type result struct {
		conn *net.UnixConn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		conn, err := g.device.Dial(g.Context(), 7)
		done <- result{conn, err}
	}()
	h, _ := g.receive()
	k := key{guest: 7, host: h.sourcePort}
	if h.op != opRequest || h.targetPort != 7 || h.room != room {
		g.Fatalf("%+v", h)
	}
	g.send(of(k, opResponse), "")
	r := <-done
	g.must(r.err)
	g.Cleanup(func() { r.conn.Close() })
	g.must(r.conn.SetDeadline(time.Now().Add(patience)))
	return r.conn, k
}

// none wants the device to have no connection left.
func (g *guest) none() {
	g.Helper()
	d := g.device
	end := time.Now().Add(patience)
	defer time.AfterFunc(patience, d.changed.Broadcast).Stop()
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(d.conns) > 0 {
		if time.Now().After(end) {
			g.Fatalf("%d connections are left", len(d.conns))
		}
		d.changed.Wait()
	}
}
