//go:build linux

package vhost

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// region is a piece of the guest's memory.
type region struct {
	guest uint64 // its address for the guest
	front uint64 // its address in QEMU's address space, as which rings are given
	bytes []byte
	whole []byte // what was mapped: bytes with what is before it in the file
}

// memory is the guest's, as it is mapped here.
type memory []region

// mapRegion maps a piece of memory that begins at an offset of its file.
func mapRegion(guest, front, size, offset uint64, file *os.File) (region, error) {
	info, err := file.Stat()
	if err != nil {
		return region{}, err
	}
	// Beyond its file's end memory is there, and kills who touches it.
	if end := offset + size; size == 0 || end < size || end > uint64(info.Size()) { //nolint:gosec // Not negative.
		return region{}, fmt.Errorf("memory of %d bytes at %d of a file of %d", size, offset, info.Size())
	}
	whole, err := unix.Mmap(int(file.Fd()), 0, int(offset+size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE) //nolint:gosec // Not above the file's size.
	if err != nil {
		return region{}, os.NewSyscallError("mmap", err)
	}
	// It may hold secrets, of which a core dump would be a copy.
	if err := unix.Madvise(whole, unix.MADV_DONTDUMP); err != nil {
		_ = unix.Munmap(whole)
		return region{}, os.NewSyscallError("madvise", err)
	}
	return region{guest: guest, front: front, bytes: whole[offset:], whole: whole}, nil
}

func (m memory) unmap() {
	for _, r := range m {
		_ = unix.Munmap(r.whole) // it was mapped
	}
}

// atGuest is the memory at an address of the guest's; nil: not all of it is there.
func (m memory) atGuest(address, size uint64) []byte {
	for _, r := range m {
		if found := r.at(address, r.guest, size); found != nil {
			return found
		}
	}
	return nil
}

// atFront is the memory at an address of QEMU's.
func (m memory) atFront(address, size uint64) []byte {
	for _, r := range m {
		if found := r.at(address, r.front, size); found != nil {
			return found
		}
	}
	return nil
}

func (r region) at(address, start, size uint64) []byte {
	all := uint64(len(r.bytes))
	if address < start || address-start > all || size > all-(address-start) {
		return nil
	}
	from := address - start
	return r.bytes[from : from+size : from+size]
}
