// Package server is the agent's gRPC API: it turns messages into calls of the
// manager and what the manager returns into messages and statuses. It checks
// that a message can be turned into the domain's terms, naming the field that
// cannot; what a request may ask for is decided behind it.
//
// It also keeps the doors: the unix socket, whose callers the kernel vouches
// for, and TCP with mutual TLS. There is no third way in.
package server
