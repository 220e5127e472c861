package vm

import (
	"crypto/sha256"
	"errors"
	"net"

	"github.com/choiros/agent/internal/sandbox"
)

// booted is what a life was booted with.
type booted struct {
	bundle
	// NAT: its network is the host's own, and not the shim's.
	NAT bool `json:"nat,omitempty"`
}

// natWarning is what people are told whose machines have the host's NAT.
const natWarning = "vm.network is nat: no egress policy is kept, and sandboxes reach this host, its local network, metadata services and each other; stack keeps them from it"

// nat reports whether a machine has the host's NAT for a network if it is
// booted today.
func (d *Driver) nat(o options) bool { return d.cfg.NAT && o.Network != networkNone }

// CheckEgress implements sandbox.EgressChecker.
func (d *Driver) CheckEgress(spec sandbox.Spec) error {
	o, err := parseOptions(spec.DriverOptions)
	if err != nil {
		return err
	}
	return d.checkNAT(o, spec.Egress)
}

// checkNAT refuses an egress policy that nothing would keep.
func (d *Driver) checkNAT(o options, egress sandbox.Egress) error {
	if !d.nat(o) || allowsAll(egress) {
		return nil
	}
	return sandbox.Unsupportedf("spec.egress", "nothing keeps a policy on the host's NAT, which machines here have; set vm.network to stack in the agent's configuration, or allow everything")
}

// allowsAll reports whether a policy keeps a sandbox from nothing.
func allowsAll(e sandbox.Egress) bool {
	return (e.Mode == "" || e.Mode == sandbox.EgressAllow) && !e.DenyPrivate
}

// errNAT is a running machine that is to keep a policy.
var errNAT = errors.New("the machine was booted with the host's NAT for a network, where nothing keeps a policy; it has one that does from its next start on")

// natMAC is the address of a machine's network device on the host's NAT, where
// there are others. It stays the same, so that the DHCP server knows it again:
// with a new one each time it would run out of addresses.
func natMAC(dir string) net.HardwareAddr {
	sum := sha256.Sum256([]byte(dir))
	sum[0] = sum[0]&^1 | 2 // one host's, and given by nobody; see IEEE 802
	return sum[:6]
}
