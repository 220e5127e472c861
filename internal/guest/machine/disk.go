//go:build linux

package machine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// How long a device may take to appear. All that the machine was started with
// are there at once, but a system of its own loads their drivers when it comes to that.
const (
	findLimit       = 2 * time.Second
	systemFindLimit = 30 * time.Second
)

func (mk *maker) findLimit() time.Duration {
	if mk.ownSystem {
		return systemFindLimit
	}
	return findLimit
}

// findDisk returns the path of the block device with a serial.
func (mk *maker) findDisk(serial string) (string, error) {
	if err := checkName("disk's serial", serial); err != nil {
		return "", err
	}
	for end := time.Now().Add(mk.findLimit()); ; time.Sleep(5 * time.Millisecond) {
		files, err := filepath.Glob("/sys/block/*/serial")
		if err != nil {
			return "", err
		}
		for _, file := range files {
			if text, err := os.ReadFile(file); err == nil && strings.TrimRight(string(text), "\x00\n ") == serial {
				return "/dev/" + filepath.Base(filepath.Dir(file)), nil
			}
		}
		if time.Now().After(end) {
			return "", errors.New("the machine has no such disk")
		}
	}
}

// mountDisk mounts an ext4 or erofs disk. A blank one is made ext4 first if
// format is set; one that has grown since its file system was made is used up
// to its end.
func mountDisk(device, target string, readOnly, format bool, note func(string)) error {
	kind, err := inspect(device)
	if err != nil {
		return err
	}
	switch kind {
	case kindBlank:
		if !format || readOnly {
			return errors.New("it is blank, and is not to be formatted")
		}
		note("format")
		if err := formatDisk(device); err != nil {
			return fmt.Errorf("format: %w", err)
		}
		kind = kindExt4
	case kindUnknown:
		return errors.New("it has neither ext4 nor erofs on it, and is not blank: it is left as it is")
	}
	flags, data := uintptr(unix.MS_NOATIME|unix.MS_NODEV), ""
	if readOnly || kind == kindErofs {
		flags |= unix.MS_RDONLY
	} else {
		// What is deleted need not take room on the host any more.
		data = "discard,errors=remount-ro"
	}
	if err := unix.Mount(device, target, kind, flags, data); err != nil {
		return fmt.Errorf("mount %s: %w", kind, damaged(err))
	}
	if flags&unix.MS_RDONLY == 0 {
		if err := grow(device, target); err != nil {
			return fmt.Errorf("grow: %w", err)
		}
	}
	return nil
}

// damaged says what those errors of mount(2) mean that name no cause.
func damaged(err error) error {
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.EBADMSG), errors.Is(err, unix.EIO):
		return fmt.Errorf("its file system is damaged: %w", err)
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("the guest kit's kernel does not know that file system: %w", err)
	}
	return err
}

// What may be on a disk.
const (
	kindBlank   = ""
	kindUnknown = "unknown"
	kindExt4    = "ext4"
	kindErofs   = "erofs"
)

const (
	// edge is how much of each end of a disk is looked at. All that can be on
	// one has something there: file systems, partition tables, volumes.
	edge = 1 << 20
	// superblock is where both file systems have theirs.
	superblock = 1024
)

// inspect says what is on a disk.
func inspect(device string) (string, error) {
	file, err := os.Open(device)
	if err != nil {
		return "", err
	}
	defer file.Close()
	return inspectFile(file)
}

func inspectFile(file io.ReadSeeker) (string, error) {
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return "", err
	}
	head, err := readAt(file, 0, min(edge, size))
	if err != nil {
		return "", err
	}
	if len(head) >= superblock+64 {
		switch super := head[superblock:]; {
		case binary.LittleEndian.Uint16(super[56:]) == 0xef53:
			return kindExt4, nil
		case binary.LittleEndian.Uint32(super) == 0xe0f5e1e2:
			return kindErofs, nil
		}
	}
	tail, err := readAt(file, max(0, size-edge), min(edge, size))
	if err != nil {
		return "", err
	}
	if unfinished(head) && (isEmpty(tail) || size <= edge) {
		return kindBlank, nil
	}
	return kindUnknown, nil
}

func readAt(file io.ReadSeeker, offset, size int64) ([]byte, error) {
	if _, err := file.Seek(offset, io.SeekStart); err != nil {
		return nil, err
	}
	content := make([]byte, size)
	_, err := io.ReadFull(file, content)
	return content, err
}

func isEmpty(block []byte) bool {
	for _, b := range block {
		if b != 0 {
			return false
		}
	}
	return true
}
