//go:build linux

package reach

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// maxSockets is how many sockets of a protocol are looked at.
const maxSockets = 4096

// The states of sockets that wait for strangers: see include/net/tcp_states.h,
// whose numbers UDP borrows.
const (
	stateClose  = 7 // UDP: bound, and connected to nobody
	stateListen = 10
)

// protocol is one whose sockets are listed.
type protocol struct {
	number uint8
	state  uint8
	// In /proc/net, for IPv4; IPv6's has a 6 behind.
	file string
}

var (
	protocolTCP = protocol{unix.IPPROTO_TCP, stateListen, "tcp"}
	protocolUDP = protocol{unix.IPPROTO_UDP, stateClose, "udp"}
)

// socket is one on which something listens.
type socket struct {
	address netip.Addr
	port    uint16
	inode   uint32
	udp     bool
}

func compareSockets(a, b socket) int {
	return cmp.Or(cmp.Compare(a.port, b.port), boolCompare(a.udp, b.udp), a.address.Compare(b.address), cmp.Compare(a.inode, b.inode))
}

func boolCompare(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// sockets returns those of a protocol on which something listens, sorted, at
// most maxSockets for each version of IP. The kernel is asked for them alone
// (sock_diag(7)): reading /proc/net walks the table of all connections of the
// whole host, so it is for kernels without.
func (s *Service) sockets(p protocol) ([]socket, error) {
	var found []socket
	var err error
	if !s.noDiag.Load() {
		if found, err = s.diag(p); err == nil {
			slices.SortFunc(found, compareSockets)
			return found, nil
		}
		s.noDiag.Store(true)
	}
	if found, err = readTable("/proc/net/"+p.file, p, nil); err != nil {
		return nil, err
	}
	if more, err := readTable("/proc/net/"+p.file+"6", p, found); err == nil { // is not there without IPv6
		found = more
	}
	slices.SortFunc(found, compareSockets)
	return found, nil
}

func readTable(name string, p protocol, found []socket) ([]socket, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return parseTable(file, p, found)
}

// parseTable appends the listening sockets of a table as in /proc/net/tcp; see
// proc_pid_net(5). Lines that it does not understand it leaves out.
func parseTable(r io.Reader, p protocol, found []socket) ([]socket, error) {
	most := len(found) + maxSockets
	lines := bufio.NewScanner(r)
	for lines.Scan() && len(found) < most {
		if socket, ok := parseLine(lines.Bytes(), p); ok {
			found = append(found, socket)
		}
	}
	return found, lines.Err()
}

// The columns of such a line.
const (
	columnLocal = 1
	columnState = 3
	columnInode = 9
)

func parseLine(line []byte, p protocol) (socket, bool) {
	var fields [columnInode + 1][]byte
	n := 0
	for field := range bytes.FieldsSeq(line) {
		if fields[n] = field; n == columnInode {
			break
		}
		n++
	}
	if state, err := strconv.ParseUint(string(fields[columnState]), 16, 8); err != nil || uint8(state) != p.state {
		return socket{}, false
	}
	host, port, _ := bytes.Cut(fields[columnLocal], []byte(":"))
	address, ok := parseAddress(host)
	number, err := strconv.ParseUint(string(port), 16, 16)
	if !ok || err != nil || number == 0 {
		return socket{}, false
	}
	inode, err := strconv.ParseUint(string(fields[columnInode]), 10, 32)
	if err != nil {
		return socket{}, false
	}
	return socket{address, uint16(number), uint32(inode), p.number == unix.IPPROTO_UDP}, true
}

// parseAddress reads an address as words of 32 bits, each in the machine's own
// order of bytes.
func parseAddress(text []byte) (netip.Addr, bool) {
	var raw [16]byte
	if len(text) != 8 && len(text) != 32 {
		return netip.Addr{}, false
	}
	for i := 0; i < len(text); i += 8 {
		word, err := strconv.ParseUint(string(text[i:i+8]), 16, 32)
		if err != nil {
			return netip.Addr{}, false
		}
		binary.NativeEndian.PutUint32(raw[i/2:], uint32(word))
	}
	address, ok := netip.AddrFromSlice(raw[:len(text)/2])
	return address.Unmap(), ok
}
