package vm

import (
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
)

// kernelHead is how much of a kernel's file tells what it is, in bytes.
const kernelHead = 0x206

// Kernel is what a kernel says of itself.
type Kernel struct {
	// PageKiB is the size of the pages that a kernel for arm64 takes memory in;
	// 0: it does not say.
	PageKiB int
}

// ReadKernel refuses a kernel that machines of an architecture do not boot, or
// that is not all there as far as it says how long it is: hypervisors would take
// anything, and the guest be silent. One for arm64 has to be an Image that is
// not compressed: it does not unpack itself, and Virtualization.framework does
// not do it either (Documentation/arch/arm64/booting.rst). One for amd64 is a
// bzImage (Documentation/arch/x86/boot.rst). The error says what the file is
// instead, and how what boots is had from it.
func ReadKernel(path, arch string) (Kernel, error) {
	wanted, form := kernelImage, "an uncompressed Image"
	if arch == "amd64" {
		wanted, form = kernelBzImage, "a bzImage"
	}
	found, err := readKernel(path, arch, wanted, form, func(_ *os.File, found kernelFile) (int64, error) { return found.least, nil })
	return Kernel{PageKiB: found.pageKiB}, err
}

// CheckVmlinux is ReadKernel for the ELF file of Config.Vmlinux.
func CheckVmlinux(path, arch string) error {
	_, err := readKernel(path, arch, kernelELF, "an ELF file", func(file *os.File, _ kernelFile) (int64, error) { return elfLength(file) })
	return err
}

// readKernel reads the head of a file that is to have a form, and as many bytes
// as length says.
func readKernel(path, arch string, wanted kernelForm, form string, length func(*os.File, kernelFile) (int64, error)) (kernelFile, error) {
	file, err := os.Open(path)
	if err != nil {
		return kernelFile{}, fmt.Errorf("kernel: %w", err)
	}
	defer file.Close()
	head := make([]byte, kernelHead)
	n, err := io.ReadFull(file, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return kernelFile{}, fmt.Errorf("kernel: %w", err)
	}
	found := kernelOf(head[:n])
	if found.form != wanted {
		return found, fmt.Errorf("kernel %s is not %s for %s: it is %s%s", path, form, arch, found.what, found.cure(arch))
	}
	info, err := file.Stat()
	if err != nil {
		return found, fmt.Errorf("kernel: %w", err)
	}
	if want, err := length(file, found); err != nil || info.Size() < want {
		return found, errors.Join(fmt.Errorf("kernel %s is not all there; make it anew", path), err)
	}
	return found, nil
}

// elfLength is how long an ELF file is that has all that is to be loaded.
func elfLength(file io.ReaderAt) (int64, error) {
	kernel, err := elf.NewFile(file)
	if err != nil {
		return 0, err
	}
	defer kernel.Close()
	var end uint64
	for _, p := range kernel.Progs {
		if p.Type == elf.PT_LOAD {
			end = max(end, p.Off+p.Filesz)
		}
	}
	return int64(min(end, math.MaxInt64)), nil //nolint:gosec // It is not greater.
}

// kernelForm is what a kernel's file is.
type kernelForm int

const (
	kernelUnknown kernelForm = iota
	kernelImage
	kernelBzImage
	kernelELF
	kernelZboot
	kernelPacked
)

// kernelFile is what the head of a file says of it.
type kernelFile struct {
	form kernelForm
	what string // for people
	// unpack is the command that unpacks what is packed; empty: none is known.
	unpack string
	// offset and size are of what an EFI program has packed in it, in bytes.
	offset, size uint32
	// least is how long a bzImage is at least, in bytes.
	least int64
	// pageKiB is Kernel.PageKiB.
	pageKiB int
}

// kernelOf tells what a file with such a head is, by the marks of the formats.
func kernelOf(head []byte) kernelFile {
	has := func(offset int, mark string) bool {
		return len(head) >= offset && strings.HasPrefix(string(head[offset:]), mark)
	}
	switch {
	case has(56, "ARM\x64"):
		// Bits 1 and 2 of its flags, which only old kernels do not set.
		sizes := [...]int{0, 4, 16, 64}
		return kernelFile{form: kernelImage, what: "an Image for arm64", pageKiB: sizes[head[24]>>1&3]}
	case has(0x202, "HdrS"):
		return kernelFile{form: kernelBzImage, what: "a bzImage for amd64", least: bzImageLength(head)}
	case has(0, elf.ELFMAG):
		return kernelFile{form: kernelELF, what: "an ELF file (vmlinux)"}
	case has(0, "MZ") && has(4, "zimg") && len(head) >= 56:
		return zboot(head)
	case has(0, "MZ"):
		return kernelFile{what: "an EFI program that is no kernel's"}
	case len(head) == 0:
		return kernelFile{what: "empty"}
	}
	for _, p := range packers() {
		for _, mark := range p.marks {
			if has(0, mark) {
				return kernelFile{form: kernelPacked, what: "compressed with " + p.name, unpack: p.unpack}
			}
		}
	}
	return kernelFile{what: "no kernel in a format that is known here"}
}

// bzImageLength is how long a bzImage with such a head is at least.
func bzImageLength(head []byte) int64 {
	setup := int64(head[0x1f1]) // in sectors
	if setup == 0 {
		setup = 4
	}
	return (1+setup)*512 + 16*int64(binary.LittleEndian.Uint32(head[0x1f4:]))
}

// zboot is an EFI program that has an Image packed in it and unpacks that, with
// the help of a firmware that there is not; see
// drivers/firmware/efi/libstub/zboot-header.S.
func zboot(head []byte) kernelFile {
	f := kernelFile{
		form: kernelZboot, what: "an EFI program with the Image packed in it",
		offset: binary.LittleEndian.Uint32(head[8:]), size: binary.LittleEndian.Uint32(head[12:]),
	}
	// The kernel's build has names of its own: zstd22, xzkern.
	for _, p := range packers() {
		if strings.HasPrefix(string(head[24:56]), p.name) {
			f.what += " with " + p.name
			f.unpack = p.unpack
			break
		}
	}
	return f
}

// packer is a way in which kernels are compressed.
type packer struct {
	name, unpack string
	marks        []string
}

// packers are those that a kernel's build has: usr/Kconfig.
func packers() []packer {
	return []packer{
		{"gzip", "gzip -dc", []string{"\x1f\x8b"}},
		{"zstd", "zstd -dc", []string{"\x28\xb5\x2f\xfd"}},
		{"xz", "xz -dc", []string{"\xfd7zXZ\x00"}},
		{"lz4", "lz4 -dc", []string{"\x02\x21\x4c\x18", "\x04\x22\x4d\x18"}}, // legacy, which is the kernel's, and frames
		{"lzma", "xz -dc --format=lzma", []string{"\x5d\x00\x00"}},
		{"bzip2", "bzip2 -dc", []string{"BZh"}},
		{"lzo", "lzop -dc", []string{"\x89LZO\x00\r\n\x1a\n"}},
	}
}

// cure is what to do with a file that is not what guests of an architecture
// boot; empty: nothing.
func (f kernelFile) cure(arch string) string {
	switch {
	case f.form == kernelPacked:
		return "; unpack it with " + f.unpack
	case f.form == kernelZboot && arch == "arm64" && f.unpack != "":
		return fmt.Sprintf("; take that out with tail -c +%d | head -c %d | %s", uint64(f.offset)+1, f.size, f.unpack)
	case f.form == kernelELF && arch == "arm64":
		return "; take arch/arm64/boot/Image of the same build, or make it with objcopy -O binary"
	case f.form == kernelELF:
		return "; take arch/x86/boot/bzImage of the same build, and name this one as vmlinux"
	}
	return ""
}
