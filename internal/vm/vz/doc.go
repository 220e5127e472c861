// Package vz is the body of vm.Machine on a Mac: Virtualization.framework,
// through github.com/Code-Hex/vz, in this very process.
//
// What is decided is decided in portable files, over the interfaces of
// framework.go, which have the methods of vz under the names that they have
// there: a machine is a blueprint first, and then its states. The files
// vz_darwin*.go bind them to vz and decide nothing. So all but those runs in
// tests on Linux, over a stand-in, and those are type-checked there against
// the real vz (typecheck_test.go). docs/mac.md says what was run on a Mac.
//
// Calls of the framework take no context and may take long, or for ever: each
// is made by a goroutine that this package waits for only as long as its caller
// does. Calls that change a machine's state come one after the other, also
// after one that nobody waited for.
//
// What it refuses to do:
//
//   - Run without the entitlement com.apple.security.virtualization, or guess
//     from a message that this is what is missing: Probe tries the smallest
//     machine that there can be.
//   - Lock a disk's image: the framework does, and would find it locked.
//   - Connect a machine to a network of the host's, but its NAT if it is told to:
//     the egress policy is kept by the network that a machine is given, and by
//     nothing else.
//
// What it cannot: see that a guest has reset its machine. The framework starts
// such a guest anew, and tells nobody: it is a vm.Rebooter.
package vz
