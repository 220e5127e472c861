// Package process is a driver whose sandboxes are ordinary child processes of
// the host, for tests: real processes, signals, exit statuses, logs and
// sockets, in milliseconds and with nothing to install.
//
// Each sandbox is run by a supervisor, its shim: the calling binary once more,
// in a session of its own, so that a sandbox outlives whoever started it. The
// binary must therefore call Main first of all. A shim starts guestd as its
// child, which is the same binary again and starts the workload once it is
// configured. The shim keeps what they print, answers requests to stop, writes
// down how it ended, and leaves no process of the sandbox behind. Pausing is
// SIGSTOP to all of them. Nothing is kept in memory between two calls: whether a
// sandbox runs is told by a lock that its shim holds, never by a pid.
//
// It isolates nothing. Mounts are made believe by rewriting paths in
// arguments and environment; limits are recorded and not enforced; the
// workload runs as the user who started it. What it cannot even pretend
// (machines, disks, other users, policies of egress but for Policed) it refuses,
// and its console only echoes. Its one driver option is "start_delay",
// a duration by which Start takes longer than it needs to. Commands that guestd
// runs inside are given as the host sees things: see Command. Records are atomic but not synced: they
// survive every process, not a power cut.
package process
