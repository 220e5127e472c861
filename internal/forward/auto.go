package forward

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Mode says what becomes of ports that are found inside and nobody declared.
type Mode string

// The modes. Empty means ModeOff.
const (
	ModeOff     Mode = "off"
	ModeOffer   Mode = "offer"   // shown, and forwarded on request
	ModeForward Mode = "forward" // forwarded at once
)

// MaxAuto bounds the ports of a sandbox that are forwarded or offered by
// themselves: a guest that opens thousands harms only itself.
const MaxAuto = 32

// maxDecisions bounds what Decide returns.
const maxDecisions = 256

// firstEphemeral begins the ports that Linux gives to clients, see
// ip_local_port_range in ip(7).
const firstEphemeral = 32768

// Policy is how ports that are found inside are dealt with.
type Policy struct {
	Mode Mode
	// Deny is refused in addition to BuiltinDeny.
	Deny []PortRange
}

// PortRange is some ports of one protocol, or of both.
type PortRange struct {
	Protocol    string // "tcp", "udp" or empty: both
	First, Last uint16
	// Why is for people: "SSH"; may be empty.
	Why string
}

// BuiltinDeny is never forwarded by itself: what is the sandbox's own affair,
// what would hijack the host's, and what opens a door. A lease that is
// declared may name them all the same.
func BuiltinDeny() []PortRange {
	return []PortRange{
		{"tcp", 22, 22, "SSH"},
		{"", 53, 53, "DNS"},
		{"udp", 67, 68, "DHCP"},
		{"udp", 5353, 5353, "mDNS"},
		{"", 5355, 5355, "LLMNR"},
	}
}

// ParsePortRange reads "5355", "3000-3010", "tcp/22" or "udp/60000-61000".
func ParsePortRange(text string) (PortRange, error) {
	var r PortRange
	numbers := text
	if protocol, rest, ok := strings.Cut(text, "/"); ok {
		if protocol != "tcp" && protocol != "udp" {
			return PortRange{}, fmt.Errorf("%.40q is not of the form [tcp/|udp/]PORT[-PORT]", text)
		}
		r.Protocol, numbers = protocol, rest
	}
	from, to, isRange := strings.Cut(numbers, "-")
	if !isRange {
		to = from
	}
	first, err := strconv.ParseUint(from, 10, 16)
	last, lastErr := strconv.ParseUint(to, 10, 16)
	if err != nil || lastErr != nil || first == 0 || first > last {
		return PortRange{}, fmt.Errorf("%.40q is not of the form [tcp/|udp/]PORT[-PORT], with ports from 1 to 65535", text)
	}
	r.First, r.Last = uint16(first), uint16(last)
	return r, nil
}

// String is the form that ParsePortRange reads.
func (r PortRange) String() string {
	text := strconv.Itoa(int(r.First))
	if r.Last != r.First {
		text += "-" + strconv.Itoa(int(r.Last))
	}
	if r.Protocol != "" {
		text = r.Protocol + "/" + text
	}
	return text
}

func (r PortRange) has(port uint16, protocol string) bool {
	return r.First <= port && port <= r.Last && (r.Protocol == "" || r.Protocol == protocol)
}

// Found is a port that something inside listens on, as the guest says.
type Found struct {
	Port uint16
	UDP  bool
	// Address is what it is bound to inside; the guest may send anything.
	Address string
}

// Verdict is what becomes of a port that was found.
type Verdict string

// The verdicts.
const (
	VerdictDeclared Verdict = "declared" // it has a lease that somebody asked for
	VerdictForward  Verdict = "forward"
	VerdictOffer    Verdict = "offer"
	VerdictRefuse   Verdict = "refuse"
)

// Decision is what becomes of one port.
type Decision struct {
	Port    uint16
	UDP     bool
	Verdict Verdict
	Why     string // when refused, for people
}

// Decide says what becomes of ports that were found, one decision for each
// protocol and port, by port; and how many more there were than it returns. It
// returns none in ModeOff. What leases has keeps what it has: an Auto lease
// keeps its place among MaxAuto for as long as something listens. Where the
// guest lies it gets what it would for the truth.
func (p Policy) Decide(found []Found, leases []Lease) (decisions []Decision, more int) {
	if p.Mode != ModeOffer && p.Mode != ModeForward {
		return nil, 0
	}
	held := map[key]Lease{}
	for _, l := range leases {
		held[key{l.UDP, l.GuestPort}] = l
	}
	why := map[key]string{}
	for _, at := range found {
		k := key{at.UDP, at.Port}
		refused, seen := why[k]
		if at.Port != 0 && (!seen || refused != "") { // one address that will do is enough
			why[k] = p.refuse(at)
		}
	}
	ports := make([]key, 0, len(why))
	for k := range why {
		ports = append(ports, k)
	}
	rank := func(k key) int {
		if l, ok := held[k]; ok && l.Auto {
			return 0
		}
		return 1
	}
	slices.SortFunc(ports, func(a, b key) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.port, b.port), cmp.Compare(protocolIndex(a.udp), protocolIndex(b.udp)))
	})
	auto := 0
	for _, k := range ports {
		d := Decision{Port: k.port, UDP: k.udp, Verdict: Verdict(p.Mode), Why: why[k]}
		switch l, leased := held[k]; {
		case leased && !l.Auto:
			d.Verdict, d.Why = VerdictDeclared, ""
		case d.Why != "":
			d.Verdict = VerdictRefuse
		case auto >= MaxAuto:
			d.Verdict, d.Why = VerdictRefuse, fmt.Sprintf("%d ports of this sandbox are forwarded or offered already", MaxAuto)
		default:
			auto++
		}
		decisions = append(decisions, d)
	}
	// What is refused goes first where there is too much.
	slices.SortStableFunc(decisions, func(a, b Decision) int {
		return cmp.Compare(protocolIndex(a.Verdict == VerdictRefuse), protocolIndex(b.Verdict == VerdictRefuse))
	})
	if more = len(decisions) - maxDecisions; more > 0 {
		decisions = slices.Clone(decisions[:maxDecisions])
	}
	slices.SortFunc(decisions, func(a, b Decision) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(protocolIndex(a.UDP), protocolIndex(b.UDP)))
	})
	return decisions, max(more, 0)
}

// refuse returns why a port may not be forwarded by itself; empty: it may.
func (p Policy) refuse(at Found) string {
	protocol := Lease{UDP: at.UDP}.Protocol()
	for _, r := range BuiltinDeny() {
		if r.has(at.Port, protocol) {
			return fmt.Sprintf("%s (%s) is never forwarded by itself", r, r.Why)
		}
	}
	for _, r := range p.Deny {
		if r.has(at.Port, protocol) {
			return fmt.Sprintf("%s is on this host's deny list", r)
		}
	}
	if at.UDP && at.Port >= firstEphemeral {
		return "it looks like a client's own port"
	}
	addr, err := netip.ParseAddr(at.Address)
	switch {
	case at.Address == "":
		return ""
	case err != nil:
		return "the sandbox gave no address of it"
	case addr.IsMulticast():
		return "it listens to a group"
	case !addr.IsUnspecified() && !addr.Unmap().IsLoopback():
		return fmt.Sprintf("it listens at %s alone, not on the sandbox's loopback", addr.WithZone(""))
	}
	return ""
}
