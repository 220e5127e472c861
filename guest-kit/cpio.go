package main

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// entry is a file of the initramfs.
type entry struct {
	mode         uint32 // as stat(2) has it
	major, minor uint32 // of a device
	content      []byte
}

// Kinds of file; see inode(7).
const (
	folder  = 0o040000
	regular = 0o100000
	device  = 0o020000
)

// archive writes an initramfs: entries by their paths, without a leading
// slash. Equal ones give equal bytes. The format, newc, is described in
// Documentation/driver-api/early-userspace/buffer-format.rst.
func archive(entries map[string]entry) []byte {
	names := make([]string, 0, len(entries))
	for name := range entries {
		names = append(names, name)
	}
	slices.Sort(names) // so that folders come before what is in them
	var out bytes.Buffer
	for i, name := range names {
		entries[name].write(&out, name, i+1)
	}
	entry{}.write(&out, "TRAILER!!!", 0)
	out.Write(make([]byte, -out.Len()&511))
	return out.Bytes()
}

func (e entry) write(out *bytes.Buffer, name string, inode int) {
	fields := []uint32{
		uint32(inode), e.mode, 0, 0, 1, 0, uint32(len(e.content)), //nolint:gosec // Small.
		0, 0, e.major, e.minor, uint32(len(name) + 1), 0, //nolint:gosec // Small.
	}
	out.WriteString("070701")
	for _, field := range fields {
		fmt.Fprintf(out, "%08X", field)
	}
	out.WriteString(name + "\x00" + strings.Repeat("\x00", -(110+len(name)+1)&3))
	out.Write(e.content)
	out.Write(make([]byte, -len(e.content)&3))
}
