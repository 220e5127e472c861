// Package exposure looks through a folder of the host's for what its owner may
// not mean to show to a sandbox: files of environment, private keys, and
// credentials, told by their names and a few of them by their first bytes.
//
// It warns and protects nothing: it is bounded in time and in number, so that no
// boot waits for it, and it leaves out what others made and is large. That it
// finds nothing is no promise. It follows no links, opens nothing but regular
// files, and keeps none of what they hold.
package exposure
