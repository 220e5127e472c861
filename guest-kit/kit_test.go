package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// image is an arm64 kernel, as far as it is looked at.
func image() []byte {
	content := bytes.Repeat([]byte("kernel"), 100)
	copy(content[56:], "ARM\x64")
	return content
}

func gzipped(t *testing.T, content []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// zboot is an EFI program that unpacks a kernel.
func zboot(packed []byte, how string) []byte {
	header := make([]byte, 64)
	copy(header, "MZ")
	copy(header[4:], "zimg")
	binary.LittleEndian.PutUint32(header[8:], 64)
	binary.LittleEndian.PutUint32(header[12:], uint32(len(packed)))
	copy(header[24:], how)
	return append(header, append(packed, "padding"...)...)
}

func TestKernelsAreUnpackedForHypervisors(t *testing.T) {
	t.Parallel()
	packed := gzipped(t, image())
	for what, kernel := range map[string][]byte{
		"plain": image(), "gzip": packed, "zboot": zboot(packed, "gzip"), "gzip and padding": append(bytes.Clone(packed), 0, 0, 0),
	} {
		if got, err := bootable("arm64", kernel); err != nil || !bytes.Equal(got, image()) {
			t.Errorf("%s: %d bytes, %v", what, len(got), err)
		}
	}
	truncated := zboot(packed, "gzip")
	for what, kernel := range map[string][]byte{
		"nothing": nil, "something": []byte(strings.Repeat("x", 4096)), "half": packed[:len(packed)/2],
		"not a kernel": gzipped(t, []byte("hello")), "zstd": zboot(packed, "zstd22"), "truncated": truncated[:80],
	} {
		if _, err := bootable("arm64", kernel); err == nil {
			t.Errorf("%s is taken for a kernel", what)
		}
	}
	bzImage := make([]byte, 1024)
	if _, err := bootable("amd64", bzImage); err == nil {
		t.Error("zeros are taken for a bzImage")
	}
	copy(bzImage[0x202:], "HdrS")
	if _, err := bootable("amd64", bzImage); err != nil {
		t.Error(err)
	}
}

// pvhKernel is an ELF file with one note, of Xen's with that number.
func pvhKernel(number uint32) []byte {
	file := make([]byte, 64+56)
	copy(file, "\x7fELF\x02\x01\x01")
	little := binary.LittleEndian
	little.PutUint16(file[16:], 2)    // ET_EXEC
	little.PutUint16(file[18:], 0x3e) // EM_X86_64
	little.PutUint32(file[20:], 1)
	little.PutUint64(file[32:], 64) // of the program headers
	little.PutUint16(file[52:], 64)
	little.PutUint16(file[54:], 56)
	little.PutUint16(file[56:], 1)
	little.PutUint32(file[64:], 4) // PT_NOTE
	little.PutUint64(file[64+8:], 64+56)
	other := append(little.AppendUint32(little.AppendUint32(little.AppendUint32(nil, 6), 1), 9), "Linux\x00\x00\x00x\x00\x00\x00"...)
	ours := append(little.AppendUint32(little.AppendUint32(little.AppendUint32(nil, 4), 4), number), "Xen\x00\x00\x00\x00\x01"...)
	notes := append(other, ours...)
	little.PutUint64(file[64+32:], uint64(len(notes)))
	return append(file, notes...)
}

// bzImageOf is a bzImage that has a payload which unpacks to size bytes.
func bzImageOf(payload []byte, size int) []byte {
	header := make([]byte, 1024)
	copy(header[0x202:], "HdrS")
	header[0x1f1] = 1
	binary.LittleEndian.PutUint16(header[0x206:], 0x20f)
	binary.LittleEndian.PutUint32(header[0x248:], 0)
	binary.LittleEndian.PutUint32(header[0x24c:], uint32(len(payload)+4))
	return append(binary.LittleEndian.AppendUint32(append(header, payload...), uint32(size)), "padding"...)
}

func zstandard(t *testing.T, content []byte) []byte {
	t.Helper()
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer encoder.Close()
	return encoder.EncodeAll(content, nil)
}

func TestVmlinuxIsFoundInBzImages(t *testing.T) {
	t.Parallel()
	kernel := pvhKernel(pvhNote)
	for what, packed := range map[string][]byte{"gzip": gzipped(t, kernel), "zstd": zstandard(t, kernel)} {
		if got, err := vmlinux(bzImageOf(packed, len(kernel))); err != nil || !bytes.Equal(got, kernel) {
			t.Errorf("%s: %d bytes, %v", what, len(got), err)
		}
	}
	packed := gzipped(t, kernel)
	old := bzImageOf(packed, len(kernel))
	old[0x206], old[0x207] = 7, 2
	for what, image := range map[string][]byte{
		"nothing": nil, "an old one": old, "truncated": bzImageOf(packed, len(kernel))[:1100], "no payload": bzImageOf(nil, 0),
		"half": bzImageOf(packed[:len(packed)/2], len(kernel)), "longer than it says": bzImageOf(packed, len(kernel)+1),
		"a bomb": bzImageOf(packed, maxKernel+1), "lzma": bzImageOf([]byte("\x5d\x00\x00\x80"), 100),
		"no ELF file": bzImageOf(gzipped(t, []byte("hello")), 5), "no entry": bzImageOf(gzipped(t, pvhKernel(17)), len(pvhKernel(17))),
	} {
		if _, err := vmlinux(image); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
}

func FuzzVmlinux(f *testing.F) {
	f.Add(bzImageOf([]byte("\x1f\x8b"), 2), true)
	f.Add(pvhKernel(pvhNote), false)
	f.Fuzz(func(_ *testing.T, kernel []byte, packed bool) {
		if packed {
			_, _ = vmlinux(kernel)
		} else {
			_ = checkPVH(kernel)
		}
	})
}

func FuzzArm64Image(f *testing.F) {
	f.Add(image())
	f.Add(zboot([]byte{0x1f, 0x8b}, "gzip"))
	f.Fuzz(func(t *testing.T, kernel []byte) {
		if got, err := arm64Image(kernel); err == nil && !isImage(got) {
			t.Error("what is not a kernel is taken for one")
		}
	})
}

func TestArchivesAreTheSameEachTimeAndReadable(t *testing.T) {
	t.Parallel()
	entries := map[string]entry{
		"init":        {mode: regular | 0o755, content: []byte("program")},
		"a":           {mode: folder | 0o755},
		"a/b":         {mode: regular | 0o644, content: bytes.Repeat([]byte("x"), 4097)},
		"dev/console": {mode: device | 0o600, major: 5, minor: 1},
		"empty":       {mode: regular | 0o600},
	}
	first := archive(entries)
	if !bytes.Equal(first, archive(entries)) {
		t.Error("two archives of the same differ")
	}
	found := map[string]entry{}
	var order []string
	for rest := first; ; {
		name, e, next := readEntry(t, rest)
		if name == "TRAILER!!!" {
			break
		}
		found[name] = e
		order = append(order, name)
		rest = next
	}
	for name, want := range entries {
		got := found[name]
		if got.mode != want.mode || got.major != want.major || got.minor != want.minor || !bytes.Equal(got.content, want.content) {
			t.Errorf("%s: mode %o, device %d:%d, %d bytes", name, got.mode, got.major, got.minor, len(got.content))
		}
	}
	if got := strings.Join(order, " "); got != "a a/b dev/console empty init" {
		t.Errorf("order: %s", got)
	}
}

// readEntry reads one entry of an archive, as the format's documentation has
// it.
func readEntry(t *testing.T, in []byte) (string, entry, []byte) {
	t.Helper()
	if len(in) < 110 || string(in[:6]) != "070701" {
		t.Fatalf("no header: %.20q", in)
	}
	field := func(i int) int {
		n := 0
		for _, digit := range in[6+8*i : 14+8*i] {
			n = n*16 + strings.IndexByte("0123456789ABCDEF", digit)
		}
		return n
	}
	round := func(n int) int { return (n + 3) &^ 3 }
	size, nameSize := field(6), field(11)
	at := round(110 + nameSize)
	name := string(in[110 : 110+nameSize-1])
	return name, entry{uint32(field(1)), uint32(field(9)), uint32(field(10)), in[at : at+size]}, in[round(at+size):]
}

func TestModulesComeAfterWhatTheyNeed(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("xz"); err != nil {
		t.Fatal("no xz: apt-get install xz-utils")
	}
	packed := map[string][]byte{}
	needs := map[string]string{
		"vmw_vsock_virtio_transport": "vmw_vsock_virtio_transport_common,vsock", "vmw_vsock_virtio_transport_common": "vsock",
		"erofs": "libcrc32c", "virtio_net": "net-failover",
	}
	for _, name := range []string{
		"vsock", "vmw_vsock_virtio_transport", "vmw_vsock_virtio_transport_common", "virtio_blk", "erofs", "libcrc32c", "overlay",
		"virtio_net", "net_failover", "virtio_rng", "virtio_balloon", "tcp_diag", "udp_diag", "tun", "binfmt_misc", "unwanted",
	} {
		packed[name] = xz(t, object("license=GPL\x00depends="+needs[name]+"\x00name="+name+"\x00"))
	}
	modules, err := selectModules(t.Context(), packed)
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, m := range modules {
		order = append(order, m.stage+":"+m.name)
	}
	want := "channel:vsock channel:vmw_vsock_virtio_transport_common channel:vmw_vsock_virtio_transport root:virtio_blk root:libcrc32c " +
		"root:erofs root:overlay root:net_failover root:virtio_net"
	if got := strings.Join(order, " "); !strings.HasPrefix(got, want) || strings.Contains(got, "unwanted") {
		t.Errorf("order: %s", got)
	}
	// It is there, and loaded by machines that need it alone.
	if !slices.Contains(order, "rosetta:binfmt_misc") {
		t.Errorf("order: %s", order)
	}
	delete(packed, "libcrc32c")
	if _, err := selectModules(t.Context(), packed); err == nil || !strings.Contains(err.Error(), "libcrc32c is not in the kernel's package, and erofs needs it") {
		t.Errorf("a module that is missing: %v", err)
	}
}

// object is an ELF file with nothing but a .modinfo section.
func object(modinfo string) []byte {
	const names = "\x00.modinfo\x00.shstrtab\x00"
	var out bytes.Buffer
	put := func(values ...any) {
		for _, v := range values {
			_ = binary.Write(&out, binary.LittleEndian, v)
		}
	}
	data := uint64(64)
	table := data + uint64(len(modinfo)+len(names))
	put([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9), uint16(1), uint16(62), uint32(1), uint64(0), uint64(0), table, uint32(0),
		uint16(64), uint16(0), uint16(0), uint16(64), uint16(3), uint16(2))
	out.WriteString(modinfo + names)
	section := func(name, kind uint32, offset, size uint64) {
		put(name, kind, uint64(0), uint64(0), offset, size, uint32(0), uint32(0), uint64(1), uint64(0))
	}
	section(0, 0, 0, 0)
	section(1, 1, data, uint64(len(modinfo)))
	section(10, 3, data+uint64(len(modinfo)), uint64(len(names)))
	return out.Bytes()
}

func xz(t *testing.T, content []byte) []byte {
	t.Helper()
	cmd := exec.Command("xz", "--stdout")
	cmd.Stdin = bytes.NewReader(content)
	packed, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return packed
}

func TestModulesLoseTheirSignatures(t *testing.T) {
	t.Parallel()
	tail := func(length string) string {
		return "\x00\x00\x02\x00\x00\x00\x00\x00" + length + "~Module signature appended~\n"
	}
	for _, c := range []struct{ object, want string }{
		{"ELF" + "sealed" + tail("\x00\x00\x00\x06"), "ELF"},
		{"ELF" + tail("\x00\x00\x00\x00"), "ELF"},
		{"ELF", "ELF"},
		{"", ""},
		// What cannot be is left as it is, for the kernel to say so.
		{"ELF" + tail("\x00\x00\x00\x04"), "ELF" + tail("\x00\x00\x00\x04")},
		{"ELF" + tail("\xff\xff\xff\xff"), "ELF" + tail("\xff\xff\xff\xff")},
		{"short~Module signature appended~\n", "short~Module signature appended~\n"},
	} {
		if got := unsigned([]byte(c.object)); string(got) != c.want {
			t.Errorf("unsigned(%q) = %q, want %q", c.object, got, c.want)
		}
	}
}

func TestPackagesAreRead(t *testing.T) {
	t.Parallel()
	var stream bytes.Buffer
	w := tar.NewWriter(&stream)
	for _, file := range [][2]string{
		{"./boot/vmlinuz-6.1-cloud", "kernel"},
		{"./boot/config-6.1-cloud", "x"},
		{"./usr/share/doc/linux-image-6.1-cloud/copyright", "Linus"},
		{"./usr/lib/modules/6.1-cloud/kernel/net/virtio-rng.ko.xz", "module"},
	} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: file[0], Size: int64(len(file[1]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, file[1]); err != nil {
			t.Fatal(err)
		}
	}
	whole := bytes.Clone(stream.Bytes())
	c := contents{modules: map[string][]byte{}}
	if err := c.read(tar.NewReader(bytes.NewReader(whole))); err != nil {
		t.Fatal(err)
	}
	if c.version != "6.1-cloud" || string(c.kernel) != "kernel" || string(c.modules["virtio_rng"]) != "module" || string(c.copyright) != "Linus" {
		t.Errorf("%q, %q, %q, %q", c.version, c.kernel, c.modules, c.copyright)
	}
	if err := c.read(tar.NewReader(bytes.NewReader(whole[:len(whole)-2]))); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a truncated package: %v", err)
	}
}

func TestKitThatIsThereIsLeftAlone(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kit")
	k := &kit{kernel: []byte("kernel"), initramfs: []byte("initramfs")}
	k.manifest = manifest{Inputs: "these", SHA256: map[string]string{kernelFile: sumBytes(k.kernel), initramfsFile: sumBytes(k.initramfs)}}
	if upToDate(dir, "these") {
		t.Error("what is not there is up to date")
	}
	if err := k.write(dir); err != nil {
		t.Fatal(err)
	}
	if !upToDate(dir, "these") || upToDate(dir, "others") {
		t.Error("a kit is not known by what it is made from")
	}
	if err := os.WriteFile(filepath.Join(dir, kernelFile), []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	if upToDate(dir, "these") {
		t.Error("a kit that was changed is up to date")
	}
}

func TestWrongCallsAreRefused(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"-arch", "riscv64", "-guestd", "x", "-o", "y"}, {"-o", "y"}, {"-guestd", "/no/such/file", "-o", "y"}, {"-x"}} {
		var said bytes.Buffer
		if code := run(args, &said); code == 0 || said.Len() == 0 {
			t.Errorf("%v: status %d, %q", args, code, &said)
		}
	}
}
