// Command guestd is the process of the agent's inside a sandbox.
package main

import (
	"os"

	"github.com/choiros/agent/internal/guest/guestd"
)

func main() { os.Exit(guestd.Run(os.Args[1:], os.Stdout, os.Stderr)) }
