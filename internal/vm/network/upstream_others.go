//go:build !darwin

package network

// hostResolver returns the resolver that the host itself uses.
func hostResolver() Resolver { return &servers{path: resolvConf} }
