package sandbox

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

const (
	maxEgressRules = 256
	maxEgressPorts = 64
)

var (
	hostLabelPattern = regexp.MustCompile(`^[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?$`)
	digitsPattern    = regexp.MustCompile(`^[0-9]+$`)
)

// EgressMode says what a sandbox may connect to.
type EgressMode string

// The modes. Empty means EgressAllow.
const (
	EgressAllow EgressMode = "allow" // everything that a sandbox can reach at all
	EgressDeny  EgressMode = "deny"  // nothing, and no name is resolved
	EgressList  EgressMode = "list"  // what a rule names
)

// Egress says what a sandbox may connect to. Whatever it says, a sandbox never
// reaches the host itself, link-local addresses, the metadata services of
// clouds, multicast, broadcast, or another sandbox; but for machines on a Mac's
// own NAT, where nothing keeps a policy and each is refused.
type Egress struct {
	Mode EgressMode `json:"mode,omitempty"`
	// Rules are given if, and only if, the mode is EgressList.
	Rules []EgressRule `json:"rules,omitempty"`
	// DenyPrivate refuses private and shared addresses (RFC 1918, RFC 6598)
	// unless a rule's CIDR has them: not even a name leads there then.
	DenyPrivate bool `json:"deny_private,omitempty"`
}

// EgressRule allows one name, with the addresses that it is found to have, or
// one range of addresses; exactly one of Name and CIDR is set.
type EgressRule struct {
	// Name is a host name, or "*." and a domain: all names below that domain,
	// but not the domain itself. Once validated it is in lower case.
	//
	// What it allows are addresses: other names that are served from the same
	// address are not told apart.
	Name string `json:"name,omitempty"`
	// CIDR is an IPv4 prefix.
	CIDR string `json:"cidr,omitempty"`
	// Ports that it is for; none: all.
	Ports []PortRange `json:"ports,omitempty"`
	// Protocol is that of the ports; empty: EgressAny.
	Protocol EgressProtocol `json:"protocol,omitempty"`
}

// PortRange is the ports from From to To. A To of 0 is From.
type PortRange struct {
	From uint16 `json:"from"`
	To   uint16 `json:"to,omitempty"`
}

// Contains reports whether the range has port.
func (r PortRange) Contains(port uint16) bool {
	return port == r.From || port > r.From && port <= r.To
}

// EgressProtocol is what a rule is for.
type EgressProtocol string

// The protocols. Empty means EgressAny.
const (
	EgressAny EgressProtocol = "any"
	EgressTCP EgressProtocol = "tcp"
	EgressUDP EgressProtocol = "udp"
)

// IsZero reports whether nothing was asked for.
func (e Egress) IsZero() bool { return e.Mode == "" && len(e.Rules) == 0 && !e.DenyPrivate }

// Clone returns a copy that shares nothing with e.
func (e Egress) Clone() Egress {
	e.Rules = slices.Clone(e.Rules)
	for i := range e.Rules {
		e.Rules[i].Ports = slices.Clone(e.Rules[i].Ports)
	}
	return e
}

// Validate brings names into lower case and refuses a policy that is wrong in
// itself. field is the policy's own path: spec.egress.
func (e *Egress) Validate(field string) error {
	switch e.Mode {
	case "", EgressAllow, EgressDeny:
		if len(e.Rules) > 0 {
			return Invalidf(field+".rules", "is given, but the mode is not list")
		}
	case EgressList:
	default:
		return Invalidf(field+".mode", "%s is none of allow, deny and list", clip(string(e.Mode)))
	}
	if len(e.Rules) > maxEgressRules {
		return Invalidf(field+".rules", "has %d rules; at most %d are allowed", len(e.Rules), maxEgressRules)
	}
	for i := range e.Rules {
		if err := e.Rules[i].validate(fmt.Sprintf("%s.rules[%d]", field, i)); err != nil {
			return err
		}
	}
	return nil
}

func (r *EgressRule) validate(field string) error {
	switch {
	case r.Name == "" && r.CIDR == "":
		return Invalidf(field, "has neither a name nor a CIDR; give one")
	case r.Name != "" && r.CIDR != "":
		return Invalidf(field+".cidr", "is given together with %s.name; give one", field)
	case r.Name != "":
		r.Name = strings.ToLower(strings.TrimSuffix(r.Name, "."))
		if err := validateEgressName(field+".name", r.Name); err != nil {
			return err
		}
	default:
		if err := validateEgressCIDR(field+".cidr", r.CIDR); err != nil {
			return err
		}
	}
	switch r.Protocol {
	case "", EgressAny, EgressTCP, EgressUDP:
	default:
		return Invalidf(field+".protocol", "%s is none of tcp, udp and any", clip(string(r.Protocol)))
	}
	if len(r.Ports) > maxEgressPorts {
		return Invalidf(field+".ports", "has %d ranges; at most %d are allowed", len(r.Ports), maxEgressPorts)
	}
	for i, ports := range r.Ports {
		switch {
		case ports.From == 0:
			return Invalidf(fmt.Sprintf("%s.ports[%d].from", field, i), "is not from 1 to 65535")
		case ports.To != 0 && ports.To < ports.From:
			return Invalidf(fmt.Sprintf("%s.ports[%d].to", field, i), "%d is below %d, where the range begins", ports.To, ports.From)
		}
	}
	return nil
}

func validateEgressName(field, name string) error {
	rest := strings.TrimPrefix(name, "*.")
	labels := strings.Split(rest, ".")
	if len(rest) > 253 || slices.ContainsFunc(labels, func(l string) bool { return !hostLabelPattern.MatchString(l) }) {
		return Invalidf(field, "%s is neither a host name nor *. and a domain (of letters, digits, - and _; write other letters as xn--)", clip(name))
	}
	// No top-level domain is a number: it is part of an address.
	if digitsPattern.MatchString(labels[len(labels)-1]) {
		return Invalidf(field, "%s is an address; give a cidr", clip(name))
	}
	return nil
}

func validateEgressCIDR(field, cidr string) error {
	if addr, err := netip.ParseAddr(cidr); err == nil && addr.Is4() {
		return Invalidf(field, "%s is one address; write %s/32", clip(cidr), addr)
	}
	prefix, err := netip.ParsePrefix(cidr)
	switch {
	case err != nil:
		return Invalidf(field, "%s is not of the form 192.0.2.0/24", clip(cidr))
	case !prefix.Addr().Is4():
		return Invalidf(field, "%s is not of IPv4, which is all that sandboxes have", clip(cidr))
	case prefix.Masked() != prefix:
		return Invalidf(field, "%s has bits set behind the prefix; write %s", clip(cidr), prefix.Masked())
	}
	return nil
}
