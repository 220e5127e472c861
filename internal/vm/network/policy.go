package network

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/choiros/agent/internal/sandbox"
)

// never is what no policy makes reachable. To it come the host's own
// addresses, which change: see hostDialer.
var never = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),     // link-local, and most clouds' metadata
	netip.MustParsePrefix("100.100.100.200/32"), // Alibaba Cloud's metadata
	netip.MustParsePrefix("168.63.129.16/32"),   // Azure's, with the secrets of extensions
	netip.MustParsePrefix("192.0.0.192/32"),     // Oracle Cloud's
	netip.MustParsePrefix("192.168.127.0/24"),   // every machine's own network, where it has no neighbours
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("240.0.0.0/4"), // reserved, and 255.255.255.255
}

var private = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("100.64.0.0/10"),
}

func within(prefixes []netip.Prefix, addr netip.Addr) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// policy is a sandbox.Egress made ready. It does not change.
type policy struct {
	mode        sandbox.EgressMode
	rules       []rule
	denyPrivate bool
}

type rule struct {
	name     string // without "*."
	below    bool   // names below it, and not itself
	prefix   netip.Prefix
	ports    []sandbox.PortRange
	protocol sandbox.EgressProtocol
}

func newPolicy(e sandbox.Egress) (*policy, error) {
	e = e.Clone()
	if err := e.Validate("egress"); err != nil {
		return nil, err
	}
	p := &policy{mode: e.Mode, denyPrivate: e.DenyPrivate}
	for _, r := range e.Rules {
		made := rule{ports: r.Ports, protocol: r.Protocol}
		if r.Name != "" {
			made.name, made.below = strings.CutPrefix(r.Name, "*.")
		} else {
			made.prefix = netip.MustParsePrefix(r.CIDR) // it was validated
		}
		p.rules = append(p.rules, made)
	}
	return p, nil
}

// resolves reports whether name, in lower case and without the last dot, may
// be asked for.
func (p *policy) resolves(name string) bool {
	switch p.mode {
	case sandbox.EgressDeny:
		return false
	case sandbox.EgressList:
		// A label may have a dot in it, which is written with a backslash. It is
		// in nobody's domain that it looks like.
		return !strings.Contains(name, "\\") && slices.ContainsFunc(p.rules, func(r rule) bool { return r.fitsName(name) })
	default:
		return true
	}
}

// admits reports whether addr may be an answer to a question for a name.
func (p *policy) admits(addr netip.Addr) bool {
	if within(never, addr) {
		return false
	}
	return !p.denyPrivate || !within(private, addr) ||
		slices.ContainsFunc(p.rules, func(r rule) bool { return r.prefix.Contains(addr) })
}

// connects reports whether to may be connected to, where names are those that
// to's address was given as an answer for.
func (p *policy) connects(to netip.AddrPort, protocol sandbox.EgressProtocol, names []string) bool {
	if p.mode == sandbox.EgressDeny || !p.admits(to.Addr()) {
		return false
	}
	if p.mode != sandbox.EgressList {
		return true
	}
	return slices.ContainsFunc(p.rules, func(r rule) bool {
		return r.fitsPort(to.Port(), protocol) && (r.prefix.Contains(to.Addr()) || slices.ContainsFunc(names, r.fitsName))
	})
}

func (r rule) fitsName(name string) bool {
	if r.below {
		head, found := strings.CutSuffix(name, "."+r.name)
		return found && head != ""
	}
	return r.name != "" && r.name == name
}

func (r rule) fitsPort(port uint16, protocol sandbox.EgressProtocol) bool {
	if r.protocol != "" && r.protocol != sandbox.EgressAny && r.protocol != protocol {
		return false
	}
	return len(r.ports) == 0 || slices.ContainsFunc(r.ports, func(p sandbox.PortRange) bool { return p.Contains(port) })
}
