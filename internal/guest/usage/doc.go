// Package usage is what guestd tells about what the sandbox uses: processor,
// memory, network, disk and processes.
//
// It reads the sandbox's own cgroup where that can be seen (cgroup v2, with a
// cgroup namespace), for what the cgroup tells, and for the rest the files of
// the sandbox's processes in /proc. It reads no arguments and no environment of
// any process. The package is for Linux alone, as guestd is.
package usage
