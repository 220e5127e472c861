//go:build !linux

package vmtest

// Main returns: there are no shims.
func Main() {}
