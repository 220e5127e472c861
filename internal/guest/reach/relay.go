//go:build linux

package reach

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

const (
	// smallBuffer is what an idle direction of a relay holds.
	smallBuffer = 4 << 10
	// maxDatagram is the most that UDP carries over IPv4, in bytes.
	maxDatagram = 65507
	// datagramIdle ends a relay of datagrams that has carried none.
	datagramIdle = 2 * time.Minute
)

// outputError is of the side that was written to.
type outputError struct{ error }

// relayStream carries bytes both ways until both have ended, or the connection
// has broken on either side. The end of one way is passed on as such, and the
// agent's reset as a reset; one of the service becomes the end of the channel,
// which knows no other.
func (s *Service) relayStream(agent net.Conn, service *net.TCPConn) {
	var back sync.WaitGroup
	back.Go(func() {
		if err := s.copyStream(agent, service); err != nil || closeWrite(agent) != nil {
			breakStream(agent, service, err)
		}
	})
	if err := s.copyStream(service, agent); err == nil {
		_ = service.CloseWrite()
	} else if _, output := errors.AsType[outputError](err); !output {
		breakStream(agent, service, err)
	} // else the service has broken off, and what it said before is still to be carried
	back.Wait()
}

// breakStream ends both ways at once. The service sees a reset, unless it was
// the one to end.
func breakStream(agent net.Conn, service *net.TCPConn, err error) {
	if err != nil {
		_ = service.SetLinger(0)
	}
	_ = service.Close()
	agent.Close()
}

func closeWrite(conn net.Conn) error {
	half, ok := conn.(interface{ CloseWrite() error })
	if !ok {
		return errors.ErrUnsupported
	}
	return half.CloseWrite()
}

// copyStream copies until the end, which is nil. It takes much memory only
// while much arrives.
func (s *Service) copyStream(dst io.Writer, src io.Reader) error {
	small := make([]byte, smallBuffer)
	buffer := small
	var large *[bufferSize]byte
	defer func() {
		if large != nil {
			s.buffers.Put(large)
		}
	}()
	for {
		n, err := src.Read(buffer)
		if n > 0 {
			if _, err := dst.Write(buffer[:n]); err != nil {
				return outputError{err}
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case large == nil && n == smallBuffer:
			large = s.buffer()
			buffer = large[:]
		case large != nil && n <= smallBuffer:
			s.buffers.Put(large)
			large, buffer = nil, small
		}
	}
}

// relayDatagrams carries datagrams, framed by their lengths on the agent's
// side, until either side ends or neither has sent one for long.
func (s *Service) relayDatagrams(agent net.Conn, service *net.UDPConn) {
	var back sync.WaitGroup
	back.Go(func() {
		s.frameDatagrams(agent, service)
		agent.Close()
	})
	s.unframeDatagrams(service, agent)
	_ = service.Close()
	back.Wait()
}

func (s *Service) frameDatagrams(agent io.Writer, service *net.UDPConn) {
	buffer := s.buffer()
	defer s.buffers.Put(buffer)
	for service.SetReadDeadline(time.Now().Add(datagramIdle)) == nil {
		n, err := service.Read(buffer[2:])
		if err != nil {
			return
		}
		if n > maxDatagram {
			continue // an IPv6 one that the other side could not send on
		}
		binary.BigEndian.PutUint16(buffer[:], uint16(n)) //nolint:gosec // Checked above.
		if _, err := agent.Write(buffer[:2+n]); err != nil {
			return
		}
	}
}

func (s *Service) unframeDatagrams(service *net.UDPConn, agent io.Reader) {
	buffer := s.buffer()
	defer s.buffers.Put(buffer)
	for {
		if _, err := io.ReadFull(agent, buffer[:2]); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint16(buffer[:]))
		if _, err := io.ReadFull(agent, buffer[:n]); err != nil || n > maxDatagram {
			return
		}
		if _, err := service.Write(buffer[:n]); err != nil {
			return
		}
		if service.SetReadDeadline(time.Now().Add(datagramIdle)) != nil {
			return
		}
	}
}
