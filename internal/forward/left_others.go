//go:build !linux

package forward

import "net/netip"

// clientLeft cannot tell here.
func clientLeft(netip.AddrPort, netip.AddrPort) (left, known bool) { return false, false }
