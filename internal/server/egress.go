package server

import (
	"context"
	"fmt"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

func (s *sandboxService) ListRefusals(
	ctx context.Context, req *agentv1.ListRefusalsRequest,
) (*agentv1.ListRefusalsResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	recent, total, err := s.manager.Refusals(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	answer := &agentv1.ListRefusalsResponse{TotalCount: total}
	for _, r := range recent {
		w := &agentv1.Refusal{
			Destination: validUTF8(r.Destination), Port: uint32(r.Port), Count: r.Count, LastTime: timeToWire(r.Last),
		}
		switch r.Protocol {
		case "tcp":
			w.Kind = agentv1.Refusal_KIND_TCP
		case "udp":
			w.Kind = agentv1.Refusal_KIND_UDP
		case "dns":
			w.Kind = agentv1.Refusal_KIND_DNS
		}
		answer.Refusals = append(answer.Refusals, w)
	}
	return answer, nil
}

func egressFromWire(w *agentv1.Egress) (sandbox.Egress, error) {
	egress := sandbox.Egress{DenyPrivate: w.GetDenyPrivate()}
	switch mode := w.GetMode(); mode {
	case agentv1.Egress_MODE_UNSPECIFIED:
	case agentv1.Egress_MODE_ALLOW:
		egress.Mode = sandbox.EgressAllow
	case agentv1.Egress_MODE_DENY:
		egress.Mode = sandbox.EgressDeny
	case agentv1.Egress_MODE_LIST:
		egress.Mode = sandbox.EgressList
	default:
		return egress, unknownEnum("spec.egress.mode", int32(mode))
	}
	for i, r := range w.GetRules() {
		rule, err := egressRuleFromWire(fmt.Sprintf("spec.egress.rules[%d]", i), r)
		if err != nil {
			return egress, err
		}
		egress.Rules = append(egress.Rules, rule)
	}
	return egress, nil
}

func egressRuleFromWire(field string, w *agentv1.EgressRule) (sandbox.EgressRule, error) {
	rule := sandbox.EgressRule{Name: w.GetName(), CIDR: w.GetCidr()}
	switch protocol := w.GetProtocol(); protocol {
	case agentv1.EgressRule_PROTOCOL_UNSPECIFIED:
	case agentv1.EgressRule_PROTOCOL_ANY:
		rule.Protocol = sandbox.EgressAny
	case agentv1.EgressRule_PROTOCOL_TCP:
		rule.Protocol = sandbox.EgressTCP
	case agentv1.EgressRule_PROTOCOL_UDP:
		rule.Protocol = sandbox.EgressUDP
	default:
		return rule, unknownEnum(field+".protocol", int32(protocol))
	}
	for i, p := range w.GetPorts() {
		from, err := portFromWire(fmt.Sprintf("%s.ports[%d].from", field, i), p.GetFrom(), 1)
		if err != nil {
			return rule, err
		}
		to, err := portFromWire(fmt.Sprintf("%s.ports[%d].to", field, i), p.GetTo(), 0)
		if err != nil {
			return rule, err
		}
		rule.Ports = append(rule.Ports, sandbox.PortRange{From: from, To: to})
	}
	return rule, nil
}

// egressToWire returns nil for a policy that nobody asked for.
func egressToWire(e sandbox.Egress) *agentv1.Egress {
	if e.IsZero() {
		return nil
	}
	w := &agentv1.Egress{DenyPrivate: e.DenyPrivate}
	switch e.Mode {
	case sandbox.EgressAllow:
		w.Mode = agentv1.Egress_MODE_ALLOW
	case sandbox.EgressDeny:
		w.Mode = agentv1.Egress_MODE_DENY
	case sandbox.EgressList:
		w.Mode = agentv1.Egress_MODE_LIST
	}
	for _, r := range e.Rules {
		rule := &agentv1.EgressRule{Name: r.Name, Cidr: r.CIDR}
		switch r.Protocol {
		case sandbox.EgressAny:
			rule.Protocol = agentv1.EgressRule_PROTOCOL_ANY
		case sandbox.EgressTCP:
			rule.Protocol = agentv1.EgressRule_PROTOCOL_TCP
		case sandbox.EgressUDP:
			rule.Protocol = agentv1.EgressRule_PROTOCOL_UDP
		}
		for _, p := range r.Ports {
			rule.Ports = append(rule.Ports, &agentv1.PortRange{From: uint32(p.From), To: uint32(p.To)})
		}
		w.Rules = append(w.Rules, rule)
	}
	return w
}
