//go:build !linux

package container

import "net"

// checkFirst believes whoever listens.
func checkFirst(net.Conn) error { return nil }
