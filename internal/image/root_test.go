package image

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/sandbox"
	testimage "github.com/choiros/agent/test/image"
)

func TestLayersOfEachCompression(t *testing.T) {
	t.Parallel()
	plain := [][]byte{layerOf(t, text("plain", "1")), layerOf(t, text("gzip", "2")), layerOf(t, text("zstd", "3")), layerOf(t, text("members", "4"))}
	half := len(plain[3]) / 2
	packed := [][]byte{plain[0], gzipped(t, plain[1]), zstdOf(t, plain[2]), append(gzipped(t, plain[3][:half]), gzipped(t, plain[3][half:])...)}
	s := open(t)
	image := load(t, s, archiveOf(t, spec{name: "localhost/a", layers: packed, diffs: plain}))[0]
	path, err := s.Root(t.Context(), image.Digest, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{`gzip "2"`, `members "4"`, `plain "1"`, `zstd "3"`}
	if diff := cmp.Diff(want, brief(list(t, path))); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestDamagedLayersAreNoticed(t *testing.T) {
	t.Parallel()
	good := layerOf(t, text("f", strings.Repeat("content", 1000)), text("g", "x"))
	for name, tc := range map[string]struct {
		layer, diff []byte
		damage      func([]byte) []byte
	}{
		"another diff id":     {gzipped(t, good), layerOf(t), nil},
		"another content":     {good, good, func(b []byte) []byte { b[1000] ^= 1; return b }},
		"another header":      {good, good, func(b []byte) []byte { copy(b, "../../x\x00"); return b }},
		"cut short":           {good, good, func(b []byte) []byte { return b[:3000] }},
		"cut between files":   {good, good, func(b []byte) []byte { return b[:len(b)-2048] }},
		"gzip cut short":      {gzipped(t, good), good, func(b []byte) []byte { return b[:len(b)-4] }},
		"gzip with a tail":    {gzipped(t, good), good, func(b []byte) []byte { return append(b, "tail"...) }},
		"zstd cut short":      {zstdOf(t, good), good, func(b []byte) []byte { return b[:len(b)-4] }},
		"empty":               {good, good, func([]byte) []byte { return nil }},
		"not a tar archive":   {[]byte(strings.Repeat("text", 1000)), []byte(strings.Repeat("text", 1000)), nil},
		"gzip of no archive":  {gzipped(t, []byte("text")), []byte("text"), nil},
		"a hint of gzip":      {[]byte{0x1f, 0x8b}, nil, nil},
		"a hint of zstd":      {[]byte{0x28, 0xb5, 0x2f, 0xfd}, nil, nil},
		"more behind the end": {good, good, func(b []byte) []byte { return append(b, 1) }},
	} {
		s := open(t)
		image := load(t, s, archiveOf(t, spec{name: "localhost/a", layers: [][]byte{tc.layer}, diffs: [][]byte{tc.diff}}))[0]
		if tc.damage != nil {
			if err := os.WriteFile(s.blob(digestOf(tc.layer)), tc.damage(bytes.Clone(tc.layer)), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		before := filesOf(t, s)
		if path, err := s.Root(t.Context(), image.Digest, nil); !errors.Is(err, sandbox.ErrCorrupt) || path != "" {
			t.Errorf("%s: %q, %v", name, path, err)
		}
		if after := filesOf(t, s); !slices.Equal(before, after) {
			t.Errorf("%s: left %v", name, after)
		}
	}
	s := open(t)
	image := load(t, s, archiveOf(t, spec{name: "localhost/a", layers: [][]byte{good}}))[0]
	if err := os.Remove(s.blob(digestOf(good))); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Root(t.Context(), image.Digest, nil); !errors.Is(err, sandbox.ErrCorrupt) || !strings.Contains(err.Error(), "missing") {
		t.Errorf("missing: %v", err)
	}
	for _, bad := range []string{"", "sha256:", "../../x", "sha256:" + strings.Repeat("/", 64)} {
		if _, err := s.Root(t.Context(), bad, nil); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestBombsAreRefused(t *testing.T) {
	t.Parallel()
	zeros := layerOf(t, text("zeros", string(make([]byte, 4<<20))))
	for name, tc := range map[string]struct{ layer, diff []byte }{
		"gzip":    {gzipped(t, zeros), zeros},
		"zstd":    {zstdOf(t, zeros), zeros},
		"padding": {gzipped(t, append(layerOf(t), make([]byte, 4<<20)...)), nil},
		"sparse":  {gnuSparse(4 << 20), gnuSparse(4 << 20)},
		"claims":  {gnuSparse(1 << 60), gnuSparse(1 << 60)},
	} {
		s := open(t)
		s.MaxBytes = 1 << 20
		image := load(t, s, archiveOf(t, spec{name: "localhost/a", layers: [][]byte{tc.layer}, diffs: [][]byte{tc.diff}}))[0]
		_, err := s.Root(t.Context(), image.Digest, nil)
		if !errors.Is(err, sandbox.ErrInvalid) || !strings.Contains(err.Error(), "more than is allowed") {
			t.Errorf("%s: %v", name, err)
		}
		if left := filesOf(t, s); len(left) != 5 {
			t.Errorf("%s: left %v", name, left)
		}
	}
	s := open(t)
	image := load(t, s, archiveOf(t, spec{name: "localhost/a", layers: [][]byte{gnuSparse(1 << 20)}}))[0]
	path, err := s.Root(t.Context(), image.Digest, nil)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Size() < 1<<20 {
		t.Errorf("%v, %v", info, err)
	}
}

// gnuSparse is a layer with a file of so many bytes that are all a hole, in the
// old form of GNU tar, which package tar cannot write.
func gnuSparse(size int64) []byte {
	h := make([]byte, 512)
	copy(h, "hole")
	copy(h[100:], "0000644\x00")
	copy(h[108:], "0000000\x00")
	copy(h[116:], "0000000\x00")
	copy(h[124:], "00000000000\x00")
	copy(h[136:], "00000000000\x00")
	h[156] = 'S'
	copy(h[257:], "ustar  \x00")
	big := h[483:495] // the real size, in base 256
	for i := range 8 {
		big[11-i] = byte(size >> (8 * i))
	}
	big[0] = 0x80
	sum := 8 * int(' ')
	for i, b := range h {
		if i < 148 || i >= 156 {
			sum += int(b)
		}
	}
	copy(h[148:], []byte{'0' + byte(sum>>15&7), '0' + byte(sum>>12&7), '0' + byte(sum>>9&7), '0' + byte(sum>>6&7), '0' + byte(sum>>3&7), '0' + byte(sum&7), 0, ' '})
	return append(h, make([]byte, 1024)...)
}

// noise is a layer that takes a while.
func noise(t testing.TB, files, size int) []byte {
	t.Helper()
	random := rand.NewChaCha8([32]byte{1})
	all := make([]item, 0, files)
	for i := range files {
		content := make([]byte, size)
		if _, err := random.Read(content); err != nil {
			t.Fatal(err)
		}
		all = append(all, text("d/"+string(rune('a'+i%26))+"/"+strings.Repeat("n", i/26+1), string(content)))
	}
	return layerOf(t, all...)
}

func TestConcurrentCallersShareOneConversion(t *testing.T) {
	t.Parallel()
	s := open(t)
	layer := noise(t, 50, 200_000)
	image := load(t, s, archiveOf(t, spec{name: "localhost/a", layers: [][]byte{gzipped(t, layer)}, diffs: [][]byte{layer}}))[0]
	other, err := Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	var callers sync.WaitGroup
	inodes := make([]fs.FileInfo, 16)
	for i := range inodes {
		store := s
		if i%2 == 1 {
			store = other
		}
		callers.Go(func() {
			path, err := store.Root(t.Context(), image.Digest, func(done, total int64) {
				if done < 0 || done > total {
					t.Errorf("progress %d of %d", done, total)
				}
			})
			if err != nil {
				t.Error(err)
				return
			}
			if inodes[i], err = os.Stat(path); err != nil {
				t.Error(err)
			}
		})
	}
	callers.Wait()
	for _, info := range inodes {
		if info == nil || !os.SameFile(info, inodes[0]) {
			t.Error("callers got different files")
		}
	}
	if len(s.flights)+len(other.flights) != 0 {
		t.Errorf("%d and %d flights are left", len(s.flights), len(other.flights))
	}
}

// asked is a context that a test decides on each time it is asked for its error.
type asked struct {
	context.Context
	mu     sync.Mutex
	times  int
	decide func(times int) error
}

func (a *asked) Err() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.times++
	return a.decide(a.times)
}

func TestCancelledConversionLeavesNothing(t *testing.T) {
	t.Parallel()
	s := open(t)
	layer := noise(t, 30, 400_000)
	image := load(t, s, archiveOf(t, spec{name: "localhost/a", layers: [][]byte{gzipped(t, layer), layerOf(t)}, diffs: [][]byte{layer, layerOf(t)}}))[0]
	before := filesOf(t, s)
	cancelled := 0
	for {
		ctx := &asked{Context: t.Context(), decide: func(times int) error {
			if times > cancelled*7 {
				return context.Canceled
			}
			return nil
		}}
		err := s.makeRoot(ctx, image.Digest, new(flight))
		if err == nil {
			break
		}
		cancelled++
		if !errors.Is(err, context.Canceled) || errors.Is(err, sandbox.ErrCorrupt) {
			t.Errorf("cancelled: %v", err)
		}
		if after := filesOf(t, s); !slices.Equal(before, after) {
			t.Errorf("left %v", after)
		}
	}
	if cancelled < 5 {
		t.Errorf("it was cancelled %d times only", cancelled)
	}
}

func TestConversionEndsWithItsLastCaller(t *testing.T) {
	t.Parallel()
	s := open(t)
	image := load(t, s, archiveOf(t, spec{name: "localhost/a", layers: [][]byte{layerOf(t, text("f", "x"))}}))[0]
	// As if another process were at it.
	held, err := s.enterStage(t.Context(), "root-"+hexOf(image.Digest))
	if err != nil {
		t.Fatal(err)
	}
	first, cancel := context.WithCancel(t.Context())
	cancelled := make(chan error, 1)
	go func() {
		_, err := s.Root(first, image.Digest, nil)
		cancelled <- err
	}()
	f := s.board(t.Context(), image.Digest)
	cancel()
	if err := <-cancelled; !errors.Is(err, context.Canceled) {
		t.Errorf("one who left: %v", err)
	}
	select {
	case <-f.done:
		t.Error("it ended with one who left")
	default:
	}
	if err := held.close(); err != nil {
		t.Fatal(err)
	}
	<-f.done
	s.leave(image.Digest, f)
	if ok, err := exists(s.root(image.Digest)); !ok || f.err != nil {
		t.Errorf("one who stayed: %v, %v", f.err, err)
	}
	if err := os.Remove(s.root(image.Digest)); err != nil {
		t.Fatal(err)
	}

	if held, err = s.enterStage(t.Context(), "root-"+hexOf(image.Digest)); err != nil {
		t.Fatal(err)
	}
	f = s.board(t.Context(), image.Digest)
	s.leave(image.Digest, f)
	<-f.done
	if !errors.Is(f.err, context.Canceled) || len(s.flights) != 0 {
		t.Errorf("when all had left: %v, %d flights", f.err, len(s.flights))
	}
	if err := held.close(); err != nil {
		t.Fatal(err)
	}
}

func TestRemovedWhileItIsConverted(t *testing.T) {
	t.Parallel()
	for _, when := range []int{3, 1000} { // while reading; while writing
		s := open(t)
		image := load(t, s, archiveOf(t, spec{name: "localhost/a", layers: [][]byte{noise(t, 1000, 5000), layerOf(t)}}))[0]
		ctx := &asked{Context: t.Context(), decide: func(times int) error {
			if times == when {
				if err := s.RemoveImage(t.Context(), "localhost/a", free); err != nil {
					t.Error(err)
				}
			}
			return nil
		}}
		if err := s.makeRoot(ctx, image.Digest, new(flight)); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("%v", err)
		}
		if left := filesOf(t, s); !slices.Equal(left, []string{"index.json", "oci-layout"}) {
			t.Errorf("left %v", left)
		}
	}
}

// The project's own test images, as they are built for all tests.
func TestProjectsImages(t *testing.T) {
	t.Parallel()
	dir := testimage.Dir(t)
	s := open(t)
	for _, name := range []string{testimage.RootOCI, testimage.RootDocker, testimage.UserOCI, testimage.UserDocker} {
		archive, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		image := load(t, s, archive)[0]
		path, err := s.Root(t.Context(), image.Digest, nil)
		if err != nil {
			t.Fatal(err)
		}
		lines := list(t, path)
		check(t, path, lines)
		if !slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, "workload -rwxr-xr-x 0:0") }) {
			t.Errorf("%s: %q", name, lines)
		}
	}
}

func unpack(t testing.TB, to string, layer []byte) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "tar", "-xpf", "-", "-C", to)
	if bytes.HasPrefix(layer, gzipMagic) {
		cmd.Args[1] = "-xpzf"
	}
	cmd.Stdin = bytes.NewReader(layer)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
}

// BenchmarkRoot converts an image, and compares with tar unpacking its layers
// into memory.
func BenchmarkRoot(b *testing.B) {
	binary, err := testimage.Binary(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	var small []item
	for i := range 4000 {
		small = append(small, text("usr/share/"+strings.Repeat("d/", i%5)+strings.Repeat("n", i%40)+strconv.Itoa(i), string(binary[i*100:i*100+i%9000])))
	}
	var large []item
	for i := range 20 {
		large = append(large, text(strconv.Itoa(i), string(binary)))
	}
	for name, layer := range map[string][]byte{
		"files":  layerOf(b, small...),
		"binary": layerOf(b, large...),
	} {
		for how, packed := range map[string][]byte{"gzip": gzipped(b, layer), "plain": layer} {
			b.Run(name+"/"+how, func(b *testing.B) { benchmarkRoot(b, packed, layer) })
		}
	}
}

func benchmarkRoot(b *testing.B, packed, layer []byte) {
	s := open(b)
	image := load(b, s, archiveOf(b, spec{name: "localhost/a", layers: [][]byte{packed}, diffs: [][]byte{layer}}))[0]
	// A file system on a disk makes many small files far more slowly than tar
	// unpacks them.
	memory := "/dev/shm"
	if _, err := os.Stat(memory); err != nil {
		memory = ""
	}
	var ours, theirs time.Duration
	for b.Loop() {
		began := time.Now()
		path, err := s.Root(b.Context(), image.Digest, nil)
		if err != nil {
			b.Fatal(err)
		}
		ours += time.Since(began)
		if err := os.Remove(path); err != nil {
			b.Fatal(err)
		}
		to, err := os.MkdirTemp(memory, "tar")
		if err != nil {
			b.Fatal(err)
		}
		began = time.Now()
		unpack(b, to, packed)
		theirs += time.Since(began)
		if err := os.RemoveAll(to); err != nil {
			b.Fatal(err)
		}
	}
	megabytes := float64(len(layer)) * float64(b.N) / 1e6
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(megabytes/ours.Seconds(), "root-MB/s")
	b.ReportMetric(megabytes/theirs.Seconds(), "tar-MB/s")
	b.ReportMetric(float64(ours)/float64(theirs), "root/tar")
}
