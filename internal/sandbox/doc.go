// Package sandbox is the domain: what a sandbox is (Spec), what can be known
// of one (Observation), what may go wrong (the error table), and the contract
// that every driver keeps (Driver).
//
// It imports nothing but the standard library and does nothing: no I/O, no
// goroutines, no clocks. What a sandbox's life looks like from outside (its
// phases, intents and policies) is package manager's business.
package sandbox
