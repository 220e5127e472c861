//go:build !linux && !darwin

package main

import (
	"fmt"
	"io"

	"github.com/choiros/agent/internal/sandbox"
)

// addMachines adds nothing: there is no driver of virtual machines for this
// system yet.
func addMachines(map[string]sandbox.Driver, Config, string, ...string) error { return nil }

func runShim(_ []string, stderr io.Writer) int {
	fmt.Fprintln(stderr, "agent: there are no virtual machines on this system yet")
	return exitFailed
}
