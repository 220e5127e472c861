package container

import (
	"os"
	"strings"

	"github.com/containers/podman/v5/pkg/specgen"
)

// network returns how a container is connected.
func network(mode networkMode, pasta []string) (specgen.Namespace, map[string][]string) {
	if mode == networkNone {
		return specgen.Namespace{NSMode: specgen.NoNetwork}, nil
	}
	return specgen.Namespace{NSMode: specgen.Pasta}, map[string][]string{"pasta": pasta}
}

// mapGuestAddrSince is the version of pasta that brought --map-guest-addr and
// --map-host-loopback. Older ones have nothing that they would turn off.
const mapGuestAddrSince = 2024_08_14

// pastaOptions are the options of pasta(1) that close the ways back to the
// host. pastaDate is its version, 0 if unknown; ipv4 says whether the host has
// a way out over IPv4.
func pastaOptions(pastaDate int, ipv4 bool) []string {
	options := []string{
		// No ports in either direction: -t and -u would listen on the host, -T
		// and -U bring the host's loopback services inside.
		"-t", "none", "-u", "none", "-T", "none", "-U", "none",
		// Else the gateway's address would lead to the host's loopback.
		"--no-map-gw",
	}
	if pastaDate == 0 || pastaDate >= mapGuestAddrSince {
		options = append(options,
			// Podman would map 169.254.1.2, as host.containers.internal, to
			// the host's main address, on which services listen that mean to
			// be open to the local network only.
			"--map-guest-addr", "none",
			"--map-host-loopback", "none")
	}
	if ipv4 {
		// The host's link-local address is reached over IPv6, whatever else is
		// closed: the container has the host's other addresses itself, so what
		// it sends there never leaves it, but not that one.
		options = append(options, "--ipv4-only")
	}
	return options
}

// hasIPv4Route reports whether the host has an IPv4 default route.
func hasIPv4Route() bool {
	table, err := os.ReadFile("/proc/net/route")
	if err != nil {
		return false
	}
	return defaultRouteIn(string(table))
}

// defaultRouteIn finds a default route in the text of /proc/net/route.
func defaultRouteIn(table string) bool {
	for line := range strings.Lines(table) {
		// Iface Destination Gateway Flags RefCnt Use Metric Mask …
		fields := strings.Fields(line)
		if len(fields) > 7 && fields[1] == "00000000" && fields[7] == "00000000" {
			return true
		}
	}
	return false
}

// hostsFile is what /etc/hosts says inside. Podman's own would name the host.
func hostsFile(hostname string) string {
	return "127.0.0.1\tlocalhost\n" +
		"::1\tlocalhost ip6-localhost ip6-loopback\n" +
		"127.0.1.1\t" + hostname + "\n"
}
