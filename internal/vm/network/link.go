package network

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// queuedBytes wait at most for a guest that does not read; more is lost,
	// as on any wire.
	queuedBytes = 1 << 20
	// framesPerTurn are read before others get their turn.
	framesPerTurn = 64
	// fullPause is how long a full link rests where the kernel cannot tell when
	// it is not full any more: ENOBUFS of macOS.
	fullPause = 200 * time.Microsecond
)

// link is the wire between the guest and the stack, whose link endpoint it is.
// There is one guest at the other end, so every frame goes to its address and
// nothing has to be resolved.
type link struct {
	conn       *net.UnixConn
	raw        syscall.RawConn
	mtu        uint32
	guest      tcpip.LinkAddress
	dispatcher stack.NetworkDispatcher

	// receiving and sending are steps that raw calls, made once.
	buf  []byte // what read has read
	turn int
	err  error // of the reader

	sending []byte
	wake    chan struct{} // holds one
	done    chan struct{}

	// mu is held while a frame is written, which never blocks, so that frames
	// stay in order.
	mu     sync.Mutex
	queue  [][]byte
	queued int
	closed bool

	frames sync.Pool
	framesIn, framesOut, bytesIn, bytesOut,
	spoofed, ignored, lost atomic.Uint64
}

// newLink takes file over.
func newLink(file *os.File, guest net.HardwareAddr, mtu int) (*link, error) {
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok || unixConn.LocalAddr().Network() != "unixgram" {
		conn.Close()
		return nil, errors.New("is not a unix datagram socket")
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		conn.Close()
		return nil, err
	}
	size := mtu + header.EthernetMinimumSize
	return &link{
		conn: unixConn, raw: raw, mtu: uint32(mtu), guest: tcpip.LinkAddress(guest),
		buf:    make([]byte, size+1), // one more shows what is too long
		wake:   make(chan struct{}, 1),
		done:   make(chan struct{}),
		frames: sync.Pool{New: func() any { b := make([]byte, 0, size); return &b }},
	}, nil
}

// receive takes in frames until the link is closed, for which it returns nil,
// or broken.
func (l *link) receive(take func(frame []byte)) error {
	step := func(fd uintptr) bool { return l.read(fd, take) }
	for {
		l.turn, l.err = framesPerTurn, nil
		err := l.raw.Read(step)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err := errors.Join(err, l.err); err != nil {
			return err
		}
	}
}

// read is a step of receive: false waits.
func (l *link) read(fd uintptr, take func(frame []byte)) bool {
	for ; l.turn > 0; l.turn-- {
		n, err := unix.Read(int(fd), l.buf)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return false
		case err != nil:
			l.err = os.NewSyscallError("read", err)
			return true
		default:
			l.framesIn.Add(1)
			l.bytesIn.Add(uint64(n))
			take(l.buf[:n])
		}
	}
	return true
}

// deliver hands an IPv4 packet to the stack, which copies what it keeps.
func (l *link) deliver(packet []byte) {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
	defer pkt.DecRef()
	l.dispatcher.DeliverNetworkPacket(ipv4.ProtocolNumber, pkt)
}

// send sends a frame, queues it, or loses it. It never blocks.
func (l *link) send(frame []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
	case len(l.queue) == 0 && !full(l.write(frame)):
	case l.queued+len(frame) > queuedBytes:
		l.lost.Add(1)
	default:
		l.queue = append(l.queue, append((*l.frames.Get().(*[]byte))[:0], frame...))
		l.queued += len(frame)
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
}

// full says that a frame has to wait.
func full(err error) bool { return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOBUFS) }

// write sends a frame if the link has room.
func (l *link) write(frame []byte) error {
	var err error
	if control := l.raw.Control(func(fd uintptr) { err = l.writeTo(fd, frame) }); control != nil {
		return control
	}
	return err
}

func (l *link) writeTo(fd uintptr, frame []byte) error {
	for {
		_, err := unix.Write(int(fd), frame)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil:
			l.framesOut.Add(1)
			l.bytesOut.Add(uint64(len(frame)))
		case !full(err):
			l.lost.Add(1)
		}
		return err
	}
}

// drain sends what is queued, until the link is closed.
func (l *link) drain() {
	var err error
	step := func(fd uintptr) bool {
		err = l.writeTo(fd, l.sending)
		return !errors.Is(err, unix.EAGAIN)
	}
	for {
		for l.next() {
			for {
				if closed := l.raw.Write(step); closed != nil {
					return
				}
				if !full(err) {
					break
				}
				if !l.rest() {
					return
				}
			}
			l.sent()
		}
		select {
		case <-l.wake:
		case <-l.done:
			return
		}
	}
}

// rest waits while the link is full; false: it was closed.
func (l *link) rest() bool {
	pause := time.NewTimer(fullPause)
	defer pause.Stop()
	select {
	case <-pause.C:
		return true
	case <-l.done:
		return false
	}
}

// next makes the first frame of the queue the one to send. It stays in the
// queue meanwhile, so that no later one overtakes it.
func (l *link) next() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.queue) == 0 {
		return false
	}
	l.sending = l.queue[0]
	return true
}

func (l *link) sent() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.queued -= len(l.sending)
	l.queue[0] = nil
	l.queue = l.queue[1:]
	if len(l.queue) == 0 {
		l.queue = nil
	}
	sent := l.sending
	l.frames.Put(&sent)
}

// shut ends receive and drain.
func (l *link) shut() {
	l.mu.Lock()
	closed := l.closed
	l.closed, l.queue, l.queued = true, nil, 0
	l.mu.Unlock()
	if !closed {
		close(l.done)
		_ = l.conn.Close() // which waits for the reader, who may want to send
	}
}

// WritePackets implements stack.LinkWriter.
func (l *link) WritePackets(packets stack.PacketBufferList) (int, tcpip.Error) {
	for _, pkt := range packets.AsSlice() {
		buf := l.frames.Get().(*[]byte)
		frame := (*buf)[:header.EthernetMinimumSize]
		header.Ethernet(frame).Encode(&header.EthernetFields{SrcAddr: gatewayMAC, DstAddr: l.guest, Type: pkt.NetworkProtocolNumber})
		for _, part := range pkt.AsSlices() {
			frame = append(frame, part...)
		}
		l.send(frame)
		*buf = frame[:0]
		l.frames.Put(buf)
	}
	return packets.Len(), nil
}

// Attach implements stack.NetworkLinkEndpoint, as do all below.
func (l *link) Attach(dispatcher stack.NetworkDispatcher) { l.dispatcher = dispatcher }

func (l *link) IsAttached() bool                        { return l.dispatcher != nil }
func (l *link) MTU() uint32                             { return l.mtu }
func (l *link) SetMTU(uint32)                           {} // it is fixed
func (l *link) MaxHeaderLength() uint16                 { return 0 }
func (l *link) LinkAddress() tcpip.LinkAddress          { return gatewayMAC }
func (l *link) SetLinkAddress(tcpip.LinkAddress)        {} // it is fixed
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }
func (l *link) AddHeader(*stack.PacketBuffer)           {} // WritePackets does
func (l *link) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (l *link) Wait()                                   {} // Network does
func (l *link) Close()                                  {} // Network does
func (l *link) SetOnCloseAction(func())                 {} // Network does

// Capabilities leave out checksums of what comes in: it went through memory,
// not over a wire.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload
}
