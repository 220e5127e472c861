package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

func (f *fakeAgent) AddPort(_ context.Context, req *agentv1.AddPortRequest) (*agentv1.AddPortResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	p := req.GetPort()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, forward := range s.forwards {
		if e := forward.GetEndpoint(); e.GetGuestPort() == p.GetGuestPort() && e.GetProtocol() == p.GetProtocol() {
			return &agentv1.AddPortResponse{Forward: proto.CloneOf(forward)}, nil
		}
	}
	host := p.GetHostPort()
	if host == 0 {
		host = 12000 + uint32(len(s.forwards))
	}
	forward := &agentv1.PortForward{Endpoint: &agentv1.Endpoint{
		Name: orElse(p.GetName(), fmt.Sprint(p.GetGuestPort())), GuestPort: p.GetGuestPort(), Protocol: p.GetProtocol(), Generation: 1,
		Address: net.JoinHostPort(orElse(p.GetBindAddress(), "127.0.0.1"), fmt.Sprint(host)),
	}}
	if host == 1 {
		forward.Problem = "permission denied"
	}
	s.forwards = append(s.forwards, forward)
	s.sb.Status.Endpoints = append(s.sb.GetStatus().GetEndpoints(), forward.GetEndpoint())
	return &agentv1.AddPortResponse{Forward: proto.CloneOf(forward)}, nil
}

func (f *fakeAgent) RemovePort(_ context.Context, req *agentv1.RemovePortRequest) (*agentv1.RemovePortResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	before := len(s.forwards)
	s.forwards = slices.DeleteFunc(s.forwards, func(p *agentv1.PortForward) bool {
		return p.GetEndpoint().GetGuestPort() == req.GetGuestPort() && p.GetEndpoint().GetProtocol() == req.GetProtocol()
	})
	if len(s.forwards) == before && !req.GetAllowMissing() {
		return nil, fail(&sandbox.FieldError{Field: "guest_port", Problem: fmt.Sprintf("%d is not forwarded", req.GetGuestPort()), Err: sandbox.ErrNotFound}, req.GetName())
	}
	return &agentv1.RemovePortResponse{}, nil
}

func (f *fakeAgent) ListPorts(_ context.Context, req *agentv1.ListPortsRequest) (*agentv1.ListPortsResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	answer := &agentv1.ListPortsResponse{}
	for _, forward := range s.forwards {
		answer.Forwards = append(answer.Forwards, proto.CloneOf(forward))
	}
	if len(s.forwards) > 0 {
		answer.Detected = []*agentv1.DetectedPort{
			{GuestPort: 3000, Protocol: agentv1.Protocol_PROTOCOL_TCP, Program: "node"},
			{GuestPort: 68, Protocol: agentv1.Protocol_PROTOCOL_UDP, Refusal: "DHCP is never forwarded by itself"},
		}
	}
	return answer, nil
}

// Tunnel connects to a port of this host's 127.0.0.1.
func (f *fakeAgent) Tunnel(stream grpc.BidiStreamingServer[agentv1.TunnelRequest, agentv1.TunnelResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	open := first.GetOpen()
	s, err := f.get(open.GetName())
	if err != nil {
		return err
	}
	f.mu.Lock()
	running := s.running != nil
	f.mu.Unlock()
	if !running && open.GetNoWake() {
		return fail(fmt.Errorf("tunnel to %s: it does not run: %w", open.GetName(), sandbox.ErrState), open.GetName())
	} else if !running {
		if _, err := s.boot(); err != nil {
			return fail(err, open.GetName())
		}
	}
	conn, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(open.GetGuestPort()))))
	if err != nil {
		return fail(fmt.Errorf("port %d: %w", open.GetGuestPort(), sandbox.ErrRefused), open.GetName())
	}
	defer conn.Close()
	if err := stream.Send(&agentv1.TunnelResponse{Message: &agentv1.TunnelResponse_Opened{Opened: &agentv1.TunnelOpened{Generation: 1}}}); err != nil {
		return err
	}
	received := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, &readerFunc{next: func() ([]byte, error) {
			req, err := stream.Recv()
			return req.GetData(), err
		}})
		if err == nil {
			err = conn.(*net.TCPConn).CloseWrite()
		} else {
			conn.Close()
		}
		received <- err
	}()
	_, err = io.Copy(writerFunc(func(p []byte) error {
		return stream.Send(&agentv1.TunnelResponse{Message: &agentv1.TunnelResponse_Data{Data: p}})
	}), conn)
	if err != nil {
		return fail(fmt.Errorf("connection to port %d: reset", open.GetGuestPort()), open.GetName())
	}
	if err := stream.Send(&agentv1.TunnelResponse{Message: &agentv1.TunnelResponse_Eof{Eof: &agentv1.TunnelEof{}}}); err != nil {
		return err
	}
	return <-received
}

// inlineName is the NAME of a secret whose source is inline:NAME, or empty.
func inlineName(ref *agentv1.SecretRef) string {
	if len(ref.GetSource()) > len(inlinePrefix) && ref.GetSource()[:len(inlinePrefix)] == inlinePrefix {
		return ref.GetSource()[len(inlinePrefix):]
	}
	return ""
}

// keep keeps values of a sandbox's inline secrets; f.mu is held.
func (s *fakeSandbox) keep(values map[string][]byte) error {
	for name, value := range values {
		if !slices.ContainsFunc(s.sb.GetSpec().GetSecrets(), func(ref *agentv1.SecretRef) bool { return inlineName(ref) == name }) {
			return &sandbox.FieldError{Field: "values[" + name + "]", Problem: "is no inline secret of the spec", Err: sandbox.ErrInvalid}
		}
		if s.values == nil {
			s.values = map[string]string{}
		}
		s.values[name] = string(value)
	}
	return nil
}

func (f *fakeAgent) SetSecrets(_ context.Context, req *agentv1.SetSecretsRequest) (*agentv1.SetSecretsResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := s.keep(req.GetValues()); err != nil {
		return nil, fail(err, req.GetName())
	}
	if s.running == nil {
		return &agentv1.SetSecretsResponse{}, nil
	}
	return &agentv1.SetSecretsResponse{Delivery: s.delivery(false)}, nil
}

// delivery gives the workload its secrets anew; f.mu is held. A sandbox named
// mute never acknowledges.
func (s *fakeSandbox) delivery(force bool) *agentv1.SecretDelivery {
	d := &agentv1.SecretDelivery{Name: s.sb.GetName(), Outcome: agentv1.SecretDelivery_OUTCOME_UNCHANGED}
	for name, value := range s.values {
		if s.delivered[name] != value || force {
			d.Outcome, d.Changed = agentv1.SecretDelivery_OUTCOME_ACKNOWLEDGED, append(d.Changed, name)
			d.Action = s.sb.GetSpec().GetSecretRotation().GetAction()
		}
	}
	slices.Sort(d.Changed)
	if s.sb.GetName() == "mute" {
		return &agentv1.SecretDelivery{Name: "mute", Outcome: agentv1.SecretDelivery_OUTCOME_FAILED, Message: "guestd did not acknowledge within 5s"}
	}
	s.delivered = maps.Clone(s.values)
	return d
}

func (f *fakeAgent) PushSecrets(_ context.Context, req *agentv1.PushSecretsRequest) (*agentv1.PushSecretsResponse, error) {
	if req.GetName() != "" {
		if _, err := f.get(req.GetName()); err != nil {
			return nil, err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	answer := &agentv1.PushSecretsResponse{}
	for _, name := range sortedNames(f.sandboxes) {
		s := f.sandboxes[name]
		if (req.GetName() == "" || req.GetName() == name) && s.running != nil {
			answer.Deliveries = append(answer.Deliveries, s.delivery(req.GetForce()))
		}
	}
	return answer, nil
}

func (f *fakeAgent) ListSecrets(_ context.Context, req *agentv1.ListSecretsRequest) (*agentv1.ListSecretsResponse, error) {
	s, err := f.get(req.GetName())
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	answer := &agentv1.ListSecretsResponse{}
	for _, ref := range s.sb.GetSpec().GetSecrets() {
		secret := &agentv1.Secret{Name: ref.GetName(), Source: ref.GetSource(), File: ref.GetFile(), Optional: ref.GetOptional()}
		if value, ok := s.values[inlineName(ref)]; ok && s.running != nil {
			secret.Version, secret.DeliverTime = fmt.Sprintf("v%d", len(value)), timestamppb.New(time.Now())
		} else if ref.GetOptional() {
			secret.Missing, secret.Message = true, "no such file"
		}
		answer.Secrets = append(answer.Secrets, secret)
	}
	return answer, nil
}

// StreamStats makes up samples in which every round uses half a CPU.
func (f *fakeAgent) StreamStats(req *agentv1.StreamStatsRequest, stream grpc.ServerStreamingServer[agentv1.StreamStatsResponse]) error {
	if req.GetName() != "" {
		if _, err := f.get(req.GetName()); err != nil {
			return err
		}
	}
	for first := true; ; first = false {
		round := &agentv1.StreamStatsResponse{}
		f.mu.Lock()
		for i, name := range sortedNames(f.sandboxes) {
			s := f.sandboxes[name]
			if s.running == nil || req.GetName() != "" && req.GetName() != name {
				continue
			}
			at := time.Now()
			used := uint64(at.Sub(f.began).Microseconds() / 2)
			sample := &agentv1.StatsSample{
				Name: name, Generation: 1, Time: timestamppb.New(at), CpuUsec: used, Cpus: 2, MemoryBytes: uint64(64+i) << 20, MemoryLimitBytes: 128 << 20,
				Processes: 3, NetworkReceiveBytes: 2 * used, NetworkTransmitBytes: used,
				Top: []*agentv1.StatsProcess{{Pid: 1, Command: "guestd", CpuUsec: 10, MemoryBytes: 4 << 20}, {Pid: 7, Command: "server-of-" + name, CpuUsec: used, MemoryBytes: 60 << 20}},
			}
			if !first {
				sample.CpuMillis = proto.Uint32(500)
			}
			round.Samples = append(round.Samples, sample)
		}
		f.mu.Unlock()
		if err := stream.Send(round); err != nil || req.GetOnce() {
			return err
		}
		select {
		case <-time.After(req.GetInterval().AsDuration()):
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}
