//go:build unix

package archive

import (
	"archive/tar"
	"io/fs"
	"syscall"
)

// identity is what a header does not say of a file.
type identity struct {
	inode
	links  uint64
	stored int64 // bytes on disk
}

// describe begins a header of a file.
func describe(info fs.FileInfo, name string) (*tar.Header, identity) {
	header := &tar.Header{Name: name, ModTime: info.ModTime(), Format: tar.FormatPAX}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		header.Mode = int64(info.Mode().Perm())
		return header, identity{stored: info.Size()}
	}
	header.Mode = int64(stat.Mode & 0o7777)
	header.Uid, header.Gid = int(stat.Uid), int(stat.Gid)
	return header, identity{
		inode:  inode{uint64(stat.Dev), stat.Ino}, //nolint:gosec,unconvert,nolintlint // Its type differs by system.
		links:  uint64(stat.Nlink),                //nolint:unconvert,nolintlint // Its type differs by system.
		stored: stat.Blocks * 512,                 // st_blocks of stat(2), whatever the file system's are
	}
}
