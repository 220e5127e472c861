//go:build !linux

package container

import (
	"errors"
	"net"
)

// checkFirst believes whoever listens.
func checkFirst(net.Conn, func() ([]int, error)) error { return nil }

func ownNumbers() ([]int, error) { return nil, errors.ErrUnsupported }
