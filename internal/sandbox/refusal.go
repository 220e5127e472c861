package sandbox

import "time"

// Refusal is a destination that a sandbox was kept from by its Egress, or by
// what no sandbox may reach.
type Refusal struct {
	// Destination is an address, or a name that was not resolved.
	Destination string `json:"destination"`
	Port        uint16 `json:"port,omitempty"`
	// Protocol is "tcp", "udp", or "dns" for a name.
	Protocol string    `json:"protocol"`
	Count    uint64    `json:"count"`
	Last     time.Time `json:"last"`
}
