package network

import "net"

// hostResolver returns the resolver that the host itself uses.
func hostResolver() Resolver {
	return system{resolver: net.DefaultResolver, others: &servers{path: resolvConf}}
}
