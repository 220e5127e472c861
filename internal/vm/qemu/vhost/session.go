//go:build linux

package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Requests of vhost-user.
const (
	getFeatures         = 1
	setFeatures         = 2
	setOwner            = 3
	setMemTable         = 5
	setVringNum         = 8
	setVringAddr        = 9
	setVringBase        = 10
	getVringBase        = 11
	setVringKick        = 12
	setVringCall        = 13
	setVringErr         = 14
	getProtocolFeatures = 15
	setProtocolFeatures = 16
	setVringEnable      = 18
	getConfig           = 24
)

// Flags of messages.
const (
	versionOne = 1
	isReply    = 1 << 2
	wantsReply = 1 << 3
)

// Features of the device and of the protocol.
const (
	featureVersion1 = 1 << 32
	featureProtocol = 1 << 30

	protocolReplyAck = 1 << 3
	protocolConfig   = 1 << 9
)

const (
	// maxPayload is more than any of the messages has, in bytes.
	maxPayload = 512
	// maxFiles is how many descriptors a message brings, at most.
	maxFiles = 8
	// noFile is set where a ring is to be without a descriptor.
	noFile = 1 << 8
)

var errMessage = errors.New("the front end has sent nonsense")

// session is the front end's side of a device.
type session struct {
	device *Device
	front  *net.UnixConn
	acks   bool // it wants each message acknowledged that says so
}

// message is one of the front end's.
type message struct {
	request, flags uint32
	payload        []byte
	files          []*os.File
}

// Serve works for a front end until that hangs up, which ends all connections;
// listeners stay, for the next. It waits for the front end before to be done
// with, and closes front. An error is of what the guest or the front end has done.
func (d *Device) Serve(front *net.UnixConn) error {
	defer front.Close()
	d.mu.Lock()
	for d.front != nil {
		d.changed.Wait()
	}
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.front, d.fault = front, nil
	d.mu.Unlock()
	s := &session{device: d, front: front}
	var err error
	for err == nil {
		err = s.next()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fault == nil {
		d.fault = d.receive() // what a machine has sent last
	}
	for i := range d.rings {
		d.rings[i].stop()
		d.rings[i] = ring{}
	}
	d.abortAll()
	d.memory.unmap()
	d.memory, d.front, d.started = nil, nil, false
	d.changed.Broadcast()
	if d.fault == nil && !isHangUp(err) {
		d.fault = err
	}
	return d.fault
}

// isHangUp tells a front end that is gone, in the midst of a message even, from
// one that has sent nonsense: QEMU may die at any moment, and has reasons of its own.
func isHangUp(err error) bool {
	for _, how := range []error{io.EOF, io.ErrUnexpectedEOF, net.ErrClosed, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, how) {
			return true
		}
	}
	return false
}

// next takes a message and answers it.
func (s *session) next() error {
	m, err := s.read()
	if err != nil {
		return err
	}
	defer m.close()
	reply, err := s.obey(&m)
	if err != nil {
		return fmt.Errorf("vhost-user request %d: %w", m.request, err)
	}
	if reply == nil && s.acks && m.flags&wantsReply != 0 {
		reply = make([]byte, 8) // it went well
	}
	if reply == nil {
		return nil
	}
	head := binary.LittleEndian.AppendUint32(nil, m.request)
	head = binary.LittleEndian.AppendUint32(head, versionOne|isReply)
	head = binary.LittleEndian.AppendUint32(head, uint32(len(reply))) //nolint:gosec // Short.
	_, err = s.front.Write(append(head, reply...))
	return err
}

// read reads a message.
func (s *session) read() (m message, err error) {
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	var head [12]byte
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	n, oobn, flags, _, err := s.front.ReadMsgUnix(head[:], oob)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return m, err
	}
	if m.files, err = filesOf(oob[:oobn]); err != nil {
		return m, err
	}
	if _, err = io.ReadFull(s.front, head[n:]); err != nil {
		return m, err
	}
	m.request = binary.LittleEndian.Uint32(head[0:])
	m.flags = binary.LittleEndian.Uint32(head[4:])
	length := binary.LittleEndian.Uint32(head[8:])
	if flags&unix.MSG_CTRUNC != 0 || length > maxPayload || m.flags&3 != versionOne {
		return m, fmt.Errorf("%w: request %d of %d bytes", errMessage, m.request, length)
	}
	m.payload = make([]byte, length)
	_, err = io.ReadFull(s.front, m.payload)
	return m, err
}

// close closes the descriptors that nobody took over.
func (m *message) close() {
	for _, file := range m.files {
		if file != nil {
			file.Close()
		}
	}
}

func filesOf(oob []byte) (files []*os.File, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	parts, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, os.NewSyscallError("parse control message", err)
	}
	for _, part := range parts {
		fds, err := unix.ParseUnixRights(&part)
		if err != nil {
			continue // not rights
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			// As QEMU's event descriptors are: so reading one ends when it is closed.
			if err := unix.SetNonblock(fd, true); err != nil {
				return files, os.NewSyscallError("fcntl", err)
			}
			files = append(files, os.NewFile(uintptr(fd), "vhost-user"))
		}
	}
	return files, nil
}

// takeFile takes one descriptor of the message's over.
func (m *message) takeFile() *os.File {
	for i, file := range m.files {
		if file != nil {
			m.files[i] = nil
			return file
		}
	}
	return nil
}

// obey does what a message asks. A reply is what the request has one for.
func (s *session) obey(m *message) (reply []byte, err error) {
	d := s.device
	d.mu.Lock()
	defer d.mu.Unlock()
	switch m.request {
	case getFeatures:
		return number(featureVersion1 | featureProtocol), nil
	case getProtocolFeatures:
		return number(protocolReplyAck | protocolConfig), nil
	case getConfig:
		return s.config(m.payload)
	case setOwner:
		return nil, nil
	case setMemTable:
		return nil, s.setMemory(m)
	case setVringErr:
		return nil, nil // nobody would write to it
	}
	// All others begin with a number.
	if len(m.payload) < 8 {
		return nil, errMessage
	}
	n := binary.LittleEndian.Uint64(m.payload)
	switch m.request {
	case setFeatures:
		if n&^(featureVersion1|featureProtocol) != 0 || n&featureVersion1 == 0 {
			return nil, fmt.Errorf("%w: features %#x", errMessage, n)
		}
		for i := range d.rings {
			d.rings[i].enabled = d.rings[i].enabled || n&featureProtocol == 0
		}
		return nil, nil
	case setProtocolFeatures:
		if n&^(protocolReplyAck|protocolConfig) != 0 {
			return nil, fmt.Errorf("%w: protocol features %#x", errMessage, n)
		}
		s.acks = n&protocolReplyAck != 0
		return nil, nil
	}
	index := uint32(n) //nolint:gosec // The lower half.
	without := false
	if m.request == setVringKick || m.request == setVringCall {
		without = n&noFile != 0
		index &= noFile - 1
	}
	if index >= uint32(len(d.rings)) {
		return nil, fmt.Errorf("%w: ring %d", errMessage, index)
	}
	return s.setRing(m, int(index), uint32(n>>32), without) //nolint:gosec // The upper half.
}

// setRing does what is about one ring.
func (s *session) setRing(m *message, index int, n uint32, without bool) ([]byte, error) {
	d := s.device
	r := &d.rings[index]
	switch m.request {
	case setVringNum:
		if n == 0 || n > maxRing || n&(n-1) != 0 || r.running() {
			return nil, fmt.Errorf("%w: ring of %d", errMessage, n)
		}
		r.size = uint16(n)
	case setVringBase:
		r.next = uint16(n) //nolint:gosec // Of a split ring it has 16 bits.
	case getVringBase:
		r.stop()
		state := binary.LittleEndian.AppendUint32(nil, uint32(index)) //nolint:gosec // 0 or 1.
		return binary.LittleEndian.AppendUint32(state, uint32(r.next)), nil
	case setVringAddr:
		if len(m.payload) < 40 {
			return nil, errMessage
		}
		r.descAt = binary.LittleEndian.Uint64(m.payload[8:])
		r.usedAt = binary.LittleEndian.Uint64(m.payload[16:])
		r.availAt = binary.LittleEndian.Uint64(m.payload[24:])
	case setVringKick, setVringCall:
		file := m.takeFile()
		if (file == nil) != without {
			return nil, fmt.Errorf("%w: no descriptor, or one too many", errMessage)
		}
		if m.request == setVringCall {
			closeFile(&r.call)
			r.call = file
			return nil, nil
		}
		if file == nil {
			return nil, fmt.Errorf("%w: a ring to be polled", errMessage)
		}
		closeFile(&r.kick)
		r.kick = file
		go d.heed(index, file) // until it is closed
	case setVringEnable:
		r.enabled = n == 1
	default:
		return nil, fmt.Errorf("%w: it is not known", errMessage)
	}
	return nil, s.settle(index)
}

// settle has a ring run, if it is to, with what is in it already: of that, no
// kick may tell.
func (s *session) settle(index int) error {
	d := s.device
	if err := d.rings[index].start(d.memory); err != nil {
		return err
	}
	if d.rings[toGuest].running() && d.rings[fromGuest].running() {
		d.started = true
	}
	d.changed.Broadcast()
	if index == fromGuest && d.rings[index].running() {
		return d.receive()
	}
	return nil
}

// heed heeds a ring's kicks until the descriptor is closed.
func (d *Device) heed(index int, kick *os.File) {
	var count [8]byte
	for {
		if _, err := kick.Read(count[:]); err != nil {
			return
		}
		d.mu.Lock()
		if d.rings[index].kick == kick {
			if index == fromGuest {
				if err := d.receive(); err != nil {
					d.fail(err)
				}
			}
			d.changed.Broadcast()
		}
		d.mu.Unlock()
	}
}

func number(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }

// config answers what is asked of the device's configuration, which is the
// guest's address.
func (s *session) config(payload []byte) ([]byte, error) {
	if len(payload) < 12 {
		return nil, errMessage
	}
	all := number(s.device.cid)
	offset, n := binary.LittleEndian.Uint32(payload), binary.LittleEndian.Uint32(payload[4:])
	if n > uint32(len(all)) || offset > uint32(len(all))-n || int(n) > len(payload)-12 { //nolint:gosec // Short.
		return nil, fmt.Errorf("%w: %d bytes at %d of a configuration of %d", errMessage, n, offset, len(all))
	}
	copy(payload[12:], all[offset:offset+n])
	return payload, nil
}

// setMemory takes the guest's memory, in place of what it had.
func (s *session) setMemory(m *message) error {
	if len(m.payload) < 8 {
		return errMessage
	}
	count := int(binary.LittleEndian.Uint32(m.payload))
	if count != len(m.files) || len(m.payload) < 8+32*count {
		return fmt.Errorf("%w: %d regions of memory with %d descriptors", errMessage, count, len(m.files))
	}
	var found memory
	for i, file := range m.files {
		at := m.payload[8+32*i:]
		r, err := mapRegion(binary.LittleEndian.Uint64(at), binary.LittleEndian.Uint64(at[16:]),
			binary.LittleEndian.Uint64(at[8:]), binary.LittleEndian.Uint64(at[24:]), file)
		if err != nil {
			found.unmap()
			return err
		}
		found = append(found, r)
	}
	d := s.device
	var moved []int
	for i := range d.rings {
		if d.rings[i].running() {
			d.rings[i].desc = nil
			moved = append(moved, i)
		}
	}
	d.memory.unmap()
	d.memory = found
	for _, i := range moved {
		if err := s.settle(i); err != nil {
			return err
		}
	}
	return nil
}
