package main

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// bootable returns a kernel as hypervisors boot it: a bzImage for amd64, an
// Image that is not compressed for arm64.
func bootable(arch string, kernel []byte) ([]byte, error) {
	if arch == "arm64" {
		return arm64Image(kernel)
	}
	// The boot protocol's magic; see Documentation/arch/x86/boot.rst.
	if len(kernel) < 0x206 || string(kernel[0x202:0x206]) != "HdrS" {
		return nil, errors.New("the kernel is no bzImage")
	}
	return kernel, nil
}

// maxKernel bounds what a kernel unpacks to, in bytes.
const maxKernel = 256 << 20

// vmlinux returns what a bzImage unpacks itself to, an ELF file, which QEMU
// starts as it starts guests of Xen's (PVH): at once, without the time that a
// guest's processor needs to unpack it. See Documentation/arch/x86/boot.rst.
func vmlinux(bzImage []byte) ([]byte, error) {
	const setupSects, version, payloadOffset, payloadLength = 0x1f1, 0x206, 0x248, 0x24c
	if len(bzImage) < payloadLength+4 || binary.LittleEndian.Uint16(bzImage[version:]) < 0x208 {
		return nil, errors.New("the kernel does not say where in it its payload is")
	}
	sectors := uint64(bzImage[setupSects])
	if sectors == 0 {
		sectors = 4
	}
	from := (sectors+1)*512 + uint64(binary.LittleEndian.Uint32(bzImage[payloadOffset:]))
	length := uint64(binary.LittleEndian.Uint32(bzImage[payloadLength:]))
	if from+length > uint64(len(bzImage)) || length < 4 {
		return nil, errors.New("the kernel, a bzImage, is truncated")
	}
	// What it unpacks to is as long as the payload's last four bytes say.
	payload, size := bzImage[from:from+length-4], binary.LittleEndian.Uint32(bzImage[from+length-4:])
	if size > maxKernel {
		return nil, fmt.Errorf("the kernel unpacks to %d bytes", size)
	}
	reader, err := unpacker(payload)
	if err != nil {
		return nil, err
	}
	defer reader.Close()
	kernel := make([]byte, size)
	if _, err := io.ReadFull(reader, kernel); err != nil {
		return nil, fmt.Errorf("unpack the kernel: %w", err)
	}
	return kernel, checkPVH(kernel)
}

func unpacker(payload []byte) (io.ReadCloser, error) {
	switch {
	case bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		reader, err := zstd.NewReader(bytes.NewReader(payload), zstd.WithDecoderMaxMemory(maxKernel))
		if err != nil {
			return nil, fmt.Errorf("unpack the kernel: %w", err)
		}
		return reader.IOReadCloser(), nil
	case bytes.HasPrefix(payload, []byte{0x1f, 0x8b}):
		return gzip.NewReader(bytes.NewReader(payload))
	}
	return nil, errors.New("the kernel is packed with neither zstd nor gzip")
}

// pvhNote is XEN_ELFNOTE_PHYS32_ENTRY of xen/interface/elfnote.h: where a
// hypervisor that has loaded the kernel starts it.
const pvhNote = 18

// checkPVH refuses a kernel that cannot be started without being unpacked.
func checkPVH(kernel []byte) error {
	file, err := elf.NewFile(bytes.NewReader(kernel))
	if err != nil {
		return fmt.Errorf("what the kernel unpacks to: %w", err)
	}
	defer file.Close()
	for _, segment := range file.Progs {
		if segment.Type != elf.PT_NOTE || segment.Filesz > uint64(len(kernel)) {
			continue
		}
		notes := make([]byte, segment.Filesz)
		if _, err := segment.ReadAt(notes, 0); err != nil {
			return fmt.Errorf("what the kernel unpacks to: %w", err)
		}
		for len(notes) >= 12 {
			name, desc := binary.LittleEndian.Uint32(notes), binary.LittleEndian.Uint32(notes[4:])
			end := 12 + (uint64(name)+3)&^3 + (uint64(desc)+3)&^3
			if end > uint64(len(notes)) {
				break
			}
			if binary.LittleEndian.Uint32(notes[8:]) == pvhNote && name == 4 && string(notes[12:16]) == "Xen\x00" {
				return nil
			}
			notes = notes[end:]
		}
	}
	return errors.New("what the kernel unpacks to has no entry for PVH")
}

// arm64Image unpacks an arm64 kernel: an Image as it is, gzipped, or in an EFI
// program that unpacks itself. See Documentation/arch/arm64/booting.rst, and
// drivers/firmware/efi/libstub/zboot-header.S.
func arm64Image(kernel []byte) ([]byte, error) {
	switch {
	case isImage(kernel):
		return kernel, nil
	case bytes.HasPrefix(kernel, []byte{0x1f, 0x8b}):
		return gunzip(kernel)
	case len(kernel) > 64 && string(kernel[:2]) == "MZ" && string(kernel[4:8]) == "zimg":
		offset, size := uint64(binary.LittleEndian.Uint32(kernel[8:])), uint64(binary.LittleEndian.Uint32(kernel[12:]))
		how, _, _ := bytes.Cut(kernel[24:56], []byte{0})
		if offset+size > uint64(len(kernel)) {
			return nil, errors.New("the kernel, an EFI program, is truncated")
		}
		if string(how) != "gzip" {
			return nil, fmt.Errorf("the kernel, an EFI program, is packed with %q; gzip can be unpacked", how)
		}
		return gunzip(kernel[offset : offset+size])
	}
	return nil, errors.New("the kernel is neither an Image nor one that is packed")
}

func gunzip(packed []byte) ([]byte, error) {
	reader, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, fmt.Errorf("unpack the kernel: %w", err)
	}
	reader.Multistream(false) // there may be padding
	kernel, err := io.ReadAll(reader)
	if err != nil {
		return nil, fmt.Errorf("unpack the kernel: %w", err)
	}
	if !isImage(kernel) {
		return nil, errors.New("what the kernel unpacks to is no Image")
	}
	return kernel, nil
}

func isImage(kernel []byte) bool { return len(kernel) > 64 && string(kernel[56:60]) == "ARM\x64" }
