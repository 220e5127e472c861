package main

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
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
