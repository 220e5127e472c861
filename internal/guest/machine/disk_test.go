//go:build linux

package machine

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// blank makes a file as large as a disk.
func blank(t testing.TB, mib int64) *os.File {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	if err := file.Truncate(mib << 20); err != nil {
		t.Fatal(err)
	}
	return file
}

func kindOf(t testing.TB, file *os.File) string {
	t.Helper()
	kind, err := inspectFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return kind
}

func TestOnlyBlankDisksCountAsBlank(t *testing.T) {
	t.Parallel()
	if kind := kindOf(t, blank(t, 64)); kind != kindBlank {
		t.Errorf("an empty disk is %q", kind)
	}
	for what, at := range map[string]int64{
		"boot sector": 0, "LVM": 512, "xfs or squashfs": 3, "iso9660": 0x8001, "btrfs": 0x10040, "swap": 4086,
		"GPT's copy": 64<<20 - 512, "the end of md": 64<<20 - 64<<10, "the first byte of the last": 63 << 20, "the last": 64<<20 - 1,
	} {
		file := blank(t, 64)
		if _, err := file.WriteAt([]byte{1}, at); err != nil {
			t.Fatal(err)
		}
		if kind := kindOf(t, file); kind != kindUnknown {
			t.Errorf("a disk with something of %s is %q", what, kind)
		}
	}
	for _, size := range []int64{0, 1, 100, 1000, 1 << 20, 1<<20 + 1} {
		file := blank(t, 0)
		if err := file.Truncate(size); err != nil {
			t.Fatal(err)
		}
		if kind := kindOf(t, file); kind != kindBlank {
			t.Errorf("an empty disk of %d bytes is %q", size, kind)
		}
	}
}

func TestFormattingMakesExt4(t *testing.T) {
	t.Parallel()
	for _, mib := range []int64{48, 64, 511, 512, 5000} {
		file := blank(t, mib)
		if err := formatFile(file); err != nil {
			t.Fatal(err)
		}
		if kind := kindOf(t, file); kind != kindExt4 {
			t.Errorf("%d MiB: %q", mib, kind)
		}
		super := make([]byte, 1024)
		if _, err := file.ReadAt(super, superblock); err != nil {
			t.Fatal(err)
		}
		if blocks := int64(binary.LittleEndian.Uint32(super[4:])); blocks*blockSize > mib<<20 {
			t.Errorf("%d MiB: a file system of %d blocks", mib, blocks)
		}
		// A sparse file stays one.
		var stat unix.Stat_t
		if err := unix.Fstat(int(file.Fd()), &stat); err != nil {
			t.Fatal(err)
		}
		if stat.Blocks > 1<<20/512 {
			t.Errorf("%d MiB: %d sectors were written", mib, stat.Blocks)
		}
	}
	if err := formatFile(blank(t, 47)); err == nil {
		t.Error("a disk that is too small is formatted")
	}
}

// TestFormattingThatWasCutShortIsDoneAgain: the power may go at any write.
func TestFormattingThatWasCutShortIsDoneAgain(t *testing.T) {
	t.Parallel()
	for _, mib := range []int64{64, 600} {
		packed := largeTemplate
		if mib < 512 {
			packed = smallTemplate
		}
		blocks, err := template(packed)
		if err != nil {
			t.Fatal(err)
		}
		file := blank(t, mib)
		for i, block := range slices.Backward(blocks) {
			if kind := kindOf(t, file); kind != kindBlank {
				t.Fatalf("%d MiB: with %d of %d blocks written it is %q", mib, len(blocks)-1-i, len(blocks), kind)
			}
			if _, err := file.WriteAt(block.content[:], int64(block.number)*blockSize); err != nil {
				t.Fatal(err)
			}
		}
		if kind := kindOf(t, file); kind != kindExt4 {
			t.Errorf("%d MiB: with all blocks written it is %q", mib, kind)
		}
	}
}

// FuzzInspect: what counts as blank has nothing at its ends, but for parts of
// what formatting writes.
func FuzzInspect(f *testing.F) {
	f.Add([]byte("LABELONE"), int64(512), int64(1<<20))
	f.Add([]byte{0x53, 0xef}, int64(1080), int64(4<<20))
	f.Fuzz(func(t *testing.T, content []byte, at, size int64) {
		if size < 0 || size > 4<<20 || at < 0 || int64(len(content)) > size-at {
			t.Skip()
		}
		file := blank(t, 0)
		if err := file.Truncate(size); err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteAt(content, at); err != nil {
			t.Fatal(err)
		}
		if kindOf(t, file) != kindBlank {
			return
		}
		head, err := readAt(file, 0, min(edge, size))
		if err != nil {
			t.Fatal(err)
		}
		tail, err := readAt(file, max(0, size-edge), min(edge, size))
		if err != nil {
			t.Fatal(err)
		}
		if !unfinished(head) || size > edge && !isEmpty(tail) {
			t.Errorf("%q at %d of %d counts as blank", content, at, size)
		}
	})
}

func TestNetlinksAnswersAreRead(t *testing.T) {
	t.Parallel()
	answer := make([]byte, 36)
	binary.NativeEndian.PutUint16(answer[4:], unix.NLMSG_ERROR)
	if err := acknowledged(answer); err != nil {
		t.Errorf("an acknowledgement: %v", err)
	}
	refused := int32(-int(unix.EEXIST))
	binary.NativeEndian.PutUint32(answer[16:], uint32(refused))
	if err := acknowledged(answer); err != unix.EEXIST { //nolint:errorlint // It is bare.
		t.Errorf("a refusal: %v", err)
	}
	for n := range 20 {
		if err := acknowledged(answer[:n]); err == nil {
			t.Errorf("%d bytes of an answer are taken", n)
		}
	}
}

func TestTargetsAreMadeThroughLinks(t *testing.T) {
	t.Parallel()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{
		"dangling": dir + "/made/by", "relative": "made", "loop": "loop", "up": "../" + filepath.Base(dir) + "/made", "proc": "/proc",
	} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		target, resolved string
		made             bool
	}{
		{"dangling/link", "made/by/link", true},
		{"dangling/link", "made/by/link", false},
		{"relative/by/../by/link", "made/by/link", false},
		{"up/by/x", "made/by/x", true},
		{"plain/a/b", "plain/a/b", true},
	} {
		resolved, made, err := makeTarget(filepath.Join(dir) + "/" + test.target)
		if err != nil || resolved != filepath.Join(dir, test.resolved) || made != test.made {
			t.Errorf("%s: %s, %v, %v", test.target, resolved, made, err)
		}
		if info, err := os.Stat(filepath.Join(dir, test.resolved)); err != nil || !info.IsDir() {
			t.Errorf("%s: not made: %v", test.target, err)
		}
	}
	for _, target := range []string{"loop/x", "file/x", "file", "proc/x", "proc"} {
		if resolved, _, err := makeTarget(dir + "/" + target); err == nil {
			t.Errorf("%s is taken, as %s", target, resolved)
		}
	}
}
