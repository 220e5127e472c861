// Package reach is what guestd does about the sandbox's ports: it connects to
// them for the agent, tells it which there are, and finds out when the workload
// is ready.
//
// It runs inside the sandbox as whoever the workload is, with no privilege. It
// opens connections within the sandbox's own network and reads the kernel's
// tables of its sockets; it listens nowhere. The package is for Linux alone, as
// guestd is.
package reach
