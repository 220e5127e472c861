//go:build linux

package machine

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A disk is formatted by writing the few blocks that an empty ext4 file system
// has which are not zero, and having the kernel grow it to the disk's size. So
// no mke2fs with all its libraries is needed inside, and a disk of any size
// takes no longer than a small one. What cannot grow is the journal, so there
// are two such file systems.
//
//go:generate ./templates.sh
var (
	//go:embed ext4-small.gz
	smallTemplate []byte
	//go:embed ext4-large.gz
	largeTemplate []byte
)

const (
	blockSize = 4096
	// What a disk must have to be formatted with each, in bytes.
	smallLeast = 48 << 20
	largeLeast = 512 << 20
)

// block is one of a template.
type block struct {
	number  uint64
	content [blockSize]byte
}

// template unpacks one: blocks, each preceded by its number.
func template(packed []byte) ([]block, error) {
	reader, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, err
	}
	var blocks []block
	for {
		var b block
		if err := binary.Read(reader, binary.LittleEndian, &b.number); errors.Is(err, io.EOF) {
			return blocks, nil
		} else if err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(reader, b.content[:]); err != nil {
			return nil, err
		}
		blocks = append(blocks, b)
	}
}

// formatDisk makes a blank disk ext4.
func formatDisk(device string) error {
	file, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(formatFile(file), file.Close())
}

// formatFile writes the block with the superblock last: until it is there the
// disk counts as blank.
func formatFile(file *os.File) error {
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	packed := largeTemplate
	switch {
	case size < smallLeast:
		return fmt.Errorf("it has %d MiB, and at least %d are needed", size>>20, smallLeast>>20)
	case size < largeLeast:
		packed = smallTemplate
	}
	blocks, err := template(packed)
	if err != nil {
		return err
	}
	for _, block := range slices.Backward(blocks) {
		if block.number == 0 {
			if err := file.Sync(); err != nil {
				return err
			}
		}
		if _, err := file.WriteAt(block.content[:], int64(block.number)*blockSize); err != nil { //nolint:gosec // Small.
			return err
		}
	}
	return file.Sync()
}

// unfinished reports whether the beginning of a disk is empty, but for what
// formatting writes before the superblock.
func unfinished(head []byte) bool {
	if isEmpty(head) {
		return true
	}
	for _, packed := range [][]byte{smallTemplate, largeTemplate} {
		blocks, err := template(packed)
		if err != nil {
			return false
		}
		if isPart(head, blocks) {
			return true
		}
	}
	return false
}

// isPart reports whether a disk begins with nothing, and then has no block that
// is neither empty nor a template's.
func isPart(head []byte, blocks []block) bool {
	expected := map[uint64][]byte{}
	for i := range blocks {
		if blocks[i].number > 0 {
			expected[blocks[i].number] = blocks[i].content[:]
		}
	}
	for number := uint64(0); len(head) >= blockSize; number++ {
		if found := head[:blockSize]; !isEmpty(found) && !bytes.Equal(found, expected[number]) {
			return false
		}
		head = head[blockSize:]
	}
	return isEmpty(head)
}

// The ioctls of ext4; see fs/ext4/ext4.h.
const (
	ext4Resize  = 0x40086610 // EXT4_IOC_RESIZE_FS
	ext4SetUUID = 0x4008662c // EXT4_IOC_SETFSUUID
)

// grow has the ext4 file system that is mounted from a device fill it.
func grow(device, target string) error {
	file, err := os.Open(device)
	if err != nil {
		return err
	}
	size, err := file.Seek(0, io.SeekEnd)
	var super []byte
	if err == nil {
		super, err = readAt(file, superblock, 1024)
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return err
	}
	unit := int64(1024) << (binary.LittleEndian.Uint32(super[24:]) & 7)
	has := int64(binary.LittleEndian.Uint32(super[4:])) | int64(binary.LittleEndian.Uint32(super[0x150:]))<<32
	blocks := uint64(size / unit) //nolint:gosec // Not negative.
	if size/unit <= has {
		return nil
	}
	root, err := os.Open(target)
	if err != nil {
		return err
	}
	defer root.Close()
	return ioctl(root, ext4Resize, unsafe.Pointer(&blocks))
}

// renew gives a copy of a template an identity of its own. There is no harm if
// the kernel refuses.
func renew(target string) {
	root, err := os.Open(target)
	if err != nil {
		return
	}
	defer root.Close()
	call := struct {
		length, flags uint32
		id            [16]byte
	}{length: 16}
	_, _ = rand.Read(call.id[:])
	call.id[6], call.id[8] = call.id[6]&0x0f|0x40, call.id[8]&0x3f|0x80 // a random one, as RFC 9562 has it
	_ = ioctl(root, ext4SetUUID, unsafe.Pointer(&call))
}

func ioctl(file *os.File, request uintptr, argument unsafe.Pointer) error {
	if _, _, number := unix.Syscall(unix.SYS_IOCTL, file.Fd(), request, uintptr(argument)); number != 0 {
		return number
	}
	return nil
}
