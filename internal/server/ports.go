package server

import (
	"context"
	"errors"
	"io"
	"net"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

type portService struct {
	agentv1.UnimplementedPortServiceServer
	manager *manager.Manager
}

func (s *portService) AddPort(ctx context.Context, req *agentv1.AddPortRequest) (*agentv1.AddPortResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	if req.GetPort() == nil {
		return nil, sandbox.Invalidf("port", "is missing")
	}
	port, err := portSpecFromWire("port", req.GetPort())
	if err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, _ manager.Request) (*agentv1.AddPortResponse, error) {
			added, err := s.manager.AddPort(ctx, req.GetName(), port)
			if err != nil {
				return nil, err
			}
			return &agentv1.AddPortResponse{Forward: forwardToWire(added)}, nil
		})
}

func (s *portService) RemovePort(ctx context.Context, req *agentv1.RemovePortRequest) (*agentv1.RemovePortResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	port, udp, err := guestPortFromWire("guest_port", req.GetGuestPort(), req.GetProtocol())
	if err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, request manager.Request) (*agentv1.RemovePortResponse, error) {
			if err := s.manager.RemovePort(ctx, req.GetName(), port, udp, req.GetAllowMissing(), request); err != nil {
				return nil, err
			}
			return &agentv1.RemovePortResponse{}, nil
		})
}

func guestPortFromWire(field string, number uint32, protocol agentv1.Protocol) (port uint16, udp bool, err error) {
	if udp, err = udpFromWire("protocol", protocol); err != nil {
		return 0, false, err
	}
	port, err = portFromWire(field, number, 1)
	return port, udp, err
}

func (s *portService) ListPorts(ctx context.Context, req *agentv1.ListPortsRequest) (*agentv1.ListPortsResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	ports, err := s.manager.Ports(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	sb, err := s.manager.Sandbox(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	answer := &agentv1.ListPortsResponse{Detected: detectedToWire(sb.Detected)}
	for _, p := range ports {
		answer.Forwards = append(answer.Forwards, forwardToWire(p))
	}
	return answer, nil
}

func forwardToWire(p manager.PortStatus) *agentv1.PortForward {
	return &agentv1.PortForward{
		Endpoint: endpointToWire(p.Endpoint, p.Generation), Automatic: p.Endpoint.Auto, Problem: p.Problem,
		OpenConnections:  uint32(max(p.Counts.Open, 0)), //nolint:gosec // Bounded by descriptors.
		TotalConnections: p.Counts.Accepted, FailedConnections: p.Counts.Failed,
		ReceiveBytes: p.Counts.BytesIn, TransmitBytes: p.Counts.BytesOut,
	}
}

func (s *portService) Tunnel(stream agentv1.PortService_TunnelServer) error {
	first, err := stream.Recv()
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	open := first.GetOpen()
	if open == nil {
		return sandbox.Invalidf("open", "is missing: the first request is it")
	}
	if err := sandbox.ValidateName("name", open.GetName()); err != nil {
		return err
	}
	port, udp, err := guestPortFromWire("guest_port", open.GetGuestPort(), open.GetProtocol())
	if err != nil {
		return err
	}
	conn, generation, release, err := s.manager.Tunnel(stream.Context(), open.GetName(), port, udp, !open.GetNoWake())
	if err != nil {
		return err
	}
	defer release()
	defer conn.Close()
	defer context.AfterFunc(stream.Context(), func() { conn.Close() })()
	if err := stream.Send(&agentv1.TunnelResponse{Message: &agentv1.TunnelResponse_Opened{
		Opened: &agentv1.TunnelOpened{Generation: generation},
	}}); err != nil {
		return err
	}
	// It ends with the stream, which this method's return ends.
	inward := make(chan error, 1)
	go func() { inward <- tunnelIn(stream, conn) }()
	if err := tunnelOut(stream, conn); err != nil {
		return err
	}
	return <-inward
}

// tunnelIn carries what the caller sends, and then its end.
func tunnelIn(stream agentv1.PortService_TunnelServer, conn net.Conn) error {
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			if half, ok := conn.(interface{ CloseWrite() error }); ok {
				_ = half.CloseWrite() // if it is over, reading says how
				return nil
			}
			return conn.Close()
		}
		if err == nil && req.GetOpen() != nil {
			err = sandbox.Invalidf("open", "came twice")
		}
		if err != nil {
			conn.Close() // ends the other direction
			return err
		}
		if _, err := conn.Write(req.GetData()); err != nil {
			return nil //nolint:nilerr // Reading says how it ended.
		}
	}
}

// tunnelOut carries what comes from inside, and then its end.
func tunnelOut(stream agentv1.PortService_TunnelServer, conn net.Conn) error {
	err := chunks(conn, func(data []byte) error {
		return stream.Send(&agentv1.TunnelResponse{Message: &agentv1.TunnelResponse_Data{Data: data}})
	})
	switch {
	case stream.Context().Err() != nil:
		return context.Cause(stream.Context())
	case errors.Is(err, net.ErrClosed):
		return nil // tunnelIn says why
	case err != nil:
		return err
	}
	return stream.Send(&agentv1.TunnelResponse{Message: &agentv1.TunnelResponse_Eof{Eof: &agentv1.TunnelEof{}}})
}
