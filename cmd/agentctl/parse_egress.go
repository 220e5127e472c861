package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// The words of a policy of egress that are no rules.
const (
	egressAllow       = "allow"
	egressDeny        = "deny"
	egressDenyPrivate = "deny-private"

	ruleForm = "NAME_OR_CIDR[:PORTS][/tcp|udp]"
)

// parseEgress reads allow, deny, or rules with commas between them, and
// deny-private beside any of them.
func parseEgress(s string) (*agentv1.Egress, error) { return egressOf(strings.Split(s, ",")) }

func egressOf(words []string) (*agentv1.Egress, error) {
	e := &agentv1.Egress{}
	for _, word := range words {
		mode := agentv1.Egress_MODE_LIST
		switch word = strings.TrimSpace(word); word {
		case egressAllow:
			mode = agentv1.Egress_MODE_ALLOW
		case egressDeny:
			mode = agentv1.Egress_MODE_DENY
		case egressDenyPrivate:
			e.DenyPrivate = true
			continue
		default:
			rule, err := parseEgressRule(word)
			if err != nil {
				return nil, err
			}
			e.Rules = append(e.Rules, rule)
		}
		if e.Mode != agentv1.Egress_MODE_UNSPECIFIED && e.Mode != mode {
			return nil, fmt.Errorf("%q: give allow, deny, or rules of the form %s", strings.Join(words, ","), ruleForm)
		}
		e.Mode = mode
	}
	if e.GetMode() == agentv1.Egress_MODE_UNSPECIFIED {
		e.Mode = agentv1.Egress_MODE_ALLOW
	}
	return e, nil
}

func parseEgressMode(s string) (agentv1.Egress_Mode, error) {
	switch s {
	case egressAllow:
		return agentv1.Egress_MODE_ALLOW, nil
	case egressDeny:
		return agentv1.Egress_MODE_DENY, nil
	case "list":
		return agentv1.Egress_MODE_LIST, nil
	}
	return 0, fmt.Errorf("%q is none of allow, deny and list", s)
}

// parseEgressRule reads NAME_OR_CIDR[:PORTS][/tcp|udp].
func parseEgressRule(s string) (*agentv1.EgressRule, error) {
	rule, rest := &agentv1.EgressRule{}, s
	for _, name := range []string{"tcp", "udp"} {
		if before, found := strings.CutSuffix(s, "/"+name); found {
			rest = before
			rule.Protocol, _ = parseEgressProtocol(name)
		}
	}
	if destination, ports, found := strings.Cut(rest, ":"); found {
		rest = destination
		for text := range strings.SplitSeq(ports, "+") {
			r, err := parsePortRange(text)
			if err != nil {
				return nil, fmt.Errorf("%q: %w", s, err)
			}
			rule.Ports = append(rule.Ports, r)
		}
	}
	return rule, setDestination(rule, rest, s)
}

// setDestination tells a name from a range of addresses. whole is what a person
// wrote.
func setDestination(rule *agentv1.EgressRule, destination, whole string) error {
	if addr, err := netip.ParseAddr(destination); err == nil {
		destination = fmt.Sprintf("%s/%d", addr, addr.BitLen())
	}
	switch _, err := netip.ParsePrefix(destination); {
	case destination == "":
		return fmt.Errorf("%q is not of the form %s", whole, ruleForm)
	case err == nil:
		rule.Cidr = destination
	case strings.Contains(destination, "/"):
		return fmt.Errorf("%q: %q is not of the form 192.0.2.0/24", whole, destination)
	default:
		rule.Name = destination // the agent knows what names there are
	}
	return nil
}

func parseEgressProtocol(s string) (agentv1.EgressRule_Protocol, error) {
	switch s {
	case "any":
		return agentv1.EgressRule_PROTOCOL_ANY, nil
	case "tcp":
		return agentv1.EgressRule_PROTOCOL_TCP, nil
	case "udp":
		return agentv1.EgressRule_PROTOCOL_UDP, nil
	}
	return 0, fmt.Errorf("%q is none of tcp, udp and any", s)
}

// parsePortRange reads PORT or FROM-TO.
func parsePortRange(s string) (*agentv1.PortRange, error) {
	first, last, found := strings.Cut(s, "-")
	from, err := parsePortNumber(first, 1)
	if err != nil {
		return nil, err
	}
	r := &agentv1.PortRange{From: from}
	if !found {
		return r, nil
	}
	if r.To, err = parsePortNumber(last, 1); err != nil {
		return nil, err
	}
	if r.GetTo() < r.GetFrom() {
		return nil, fmt.Errorf("%q ends before it begins", s)
	}
	return r, nil
}

// egressWords are a policy such that egressOf reads it back; none: nil.
func egressWords(e *agentv1.Egress) []string {
	if e == nil {
		return nil
	}
	var words []string
	switch e.GetMode() {
	case agentv1.Egress_MODE_LIST:
		for _, rule := range e.GetRules() {
			words = append(words, ruleText(rule))
		}
	case agentv1.Egress_MODE_DENY:
		words = append(words, egressDeny)
	default:
		words = append(words, egressAllow)
	}
	if e.GetDenyPrivate() {
		words = append(words, egressDenyPrivate)
	}
	return words
}

func ruleText(rule *agentv1.EgressRule) string {
	text := orElse(rule.GetName(), rule.GetCidr())
	var ports []string
	for _, r := range rule.GetPorts() {
		port := fmt.Sprint(r.GetFrom())
		if r.GetTo() > r.GetFrom() {
			port += fmt.Sprintf("-%d", r.GetTo())
		}
		ports = append(ports, port)
	}
	if len(ports) > 0 {
		text += ":" + strings.Join(ports, "+")
	}
	if p := rule.GetProtocol(); slices.Contains([]agentv1.EgressRule_Protocol{agentv1.EgressRule_PROTOCOL_TCP, agentv1.EgressRule_PROTOCOL_UDP}, p) {
		text += "/" + lowerName(p.String(), "PROTOCOL_")
	}
	return text
}
