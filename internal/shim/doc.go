// Package shim keeps sandboxes that have a process of their own on the host: a
// shim, which runs one life of one sandbox, outlives whoever started it, and
// ends when that life does.
//
// A sandbox is a Box: a folder that says all there is to know. What was asked
// for is in a record, a life is in another, and how it ended in a third; that a
// life is still going on is said by a lock that its shim holds, never by a
// process's number, and that a record is of a life before the last reboot by
// the host's boot id. Whoever opens the folder, in whatever process, finds the
// same. Both sides are here: what a driver does with a box, and what the shim
// in it does.
//
// A shim that a user's service started leaves that service for a scope of its
// own, so that neither a crash of the service nor its restart touches it.
//
// The package knows nothing of what a shim runs, and refuses to guess: a shim
// that was killed is reported as killed.
package shim
