package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// kills is how often a test kills a process.
const kills = 12

// loadForever loads two archives by turns.
func loadForever(args []string) error {
	s, err := Open(args[0])
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		f, err := os.Open(args[1+i%2])
		if err != nil {
			return err
		}
		if _, err := s.LoadImage(context.Background(), f); err != nil {
			return err
		}
		f.Close()
		fmt.Println(i)
	}
}

// rootForever converts an image, and removes what it made.
func rootForever(args []string) error {
	s, err := Open(args[0])
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		path, err := s.Root(context.Background(), args[1], nil)
		if err != nil {
			return err
		}
		if err := os.Remove(path); err != nil {
			return err
		}
		fmt.Println(i)
	}
}

// rootOnce converts an image and prints which file that is.
func rootOnce(args []string) error {
	s, err := Open(args[0])
	if err != nil {
		return err
	}
	path, err := s.Root(context.Background(), args[1], nil)
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	fmt.Print(info.Sys().(*syscall.Stat_t).Ino)
	return nil
}

// killed runs a role, which goes on for ever, and kills it some time after it
// has come round once.
func killed(t *testing.T, role string, args ...string) {
	t.Helper()
	cmd := command(t.Context(), role, args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var problem strings.Builder
	cmd.Stderr = &problem
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Errorf("it ended by itself: %v", err)
	}
	timer := time.AfterFunc(time.Duration(rand.IntN(100))*time.Millisecond, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	buffer := make([]byte, 1024)
	for err = nil; err == nil; {
		_, err = out.Read(buffer)
	}
	_ = cmd.Wait()
	if problem.Len() > 0 {
		t.Error(problem.String())
	}
}

// wantWhole opens a store and sees that nothing in it is half-made or unused.
func wantWhole(t *testing.T, dir string) (*Store, []sandbox.Image) {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(s.temporary()); err != nil || len(left) != 0 {
		t.Errorf("tmp holds %v, %v", left, err)
	}
	images, err := s.Images(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	records, err := s.records()
	if err != nil || len(records) != len(images) {
		t.Errorf("of %d images %d are whole (%v)", len(records), len(images), err)
	}
	want := map[string]bool{}
	for _, r := range records {
		p, err := s.read(r)
		if err != nil {
			t.Fatal(err)
		}
		want[r.manifest.Digest.Hex], want[p.manifest.Config.Digest.Hex] = true, true
		for _, layer := range p.manifest.Layers {
			want[layer.Digest.Hex] = true
			if sum, err := sumFile(t.Context(), s.blob(layer.Digest.String())); err != nil || sum != layer.Digest.String() {
				t.Errorf("layer %s is %s, %v", layer.Digest, sum, err)
			}
		}
	}
	entries, err := os.ReadDir(s.blobs())
	if err != nil || len(entries) != len(want) {
		t.Errorf("there are %d blobs, want %d (%v)", len(entries), len(want), err)
	}
	return s, images
}

func TestKilledWhileLoading(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	store := filepath.Join(dir, "images")
	args := []string{store}
	for _, content := range []string{"1", "2"} {
		archive := archiveOf(t, spec{name: "localhost/a", layers: [][]byte{noise(t, 3, 300_000), layerOf(t, text("f", content))}})
		args = append(args, filepath.Join(dir, content))
		if err := os.WriteFile(args[len(args)-1], archive, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range kills {
		killed(t, "load", args...)
		s, images := wantWhole(t, store)
		if len(images) == 0 {
			t.Error("all images are gone")
		}
		named := 0
		for _, image := range images {
			named += len(image.Names)
			if _, err := s.Root(t.Context(), image.Digest, nil); err != nil {
				t.Error(err)
			}
		}
		if named != 1 {
			t.Errorf("there are %d names", named)
		}
	}
}

func TestKilledWhileConverting(t *testing.T) {
	t.Parallel()
	s := open(t)
	layer := noise(t, 20, 300_000)
	image := load(t, s, archiveOf(t, spec{name: "localhost/a", layers: [][]byte{gzipped(t, layer)}, diffs: [][]byte{layer}}))[0]
	path, err := s.Root(t.Context(), image.Digest, nil)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	for range kills {
		killed(t, "root", s.dir, image.Digest)
		s, _ = wantWhole(t, s.dir)
		got, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) || err == nil && !bytes.Equal(got, want) {
			t.Errorf("a root file system of %d bytes, want %d or none (%v)", len(got), len(want), err)
		}
	}
	if path, err = s.Root(t.Context(), image.Digest, nil); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after all it is another (%v)", err)
	}
}

// What is being made is nobody else's to remove.
func TestOpenLeavesTheLivingAlone(t *testing.T) {
	t.Parallel()
	s := open(t)
	st, err := s.newStage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(s.temporary(), "dead")
	if err := os.MkdirAll(filepath.Join(dead, "deeper"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(s.dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(st.dir); err != nil {
		t.Errorf("the living one's: %v", err)
	}
	if ok, err := exists(dead); ok || err != nil {
		t.Errorf("the dead one's is still there (%v)", err)
	}
	if err := st.close(); err != nil {
		t.Error(err)
	}
}

func TestProcessesShareOneConversion(t *testing.T) {
	t.Parallel()
	s := open(t)
	layer := noise(t, 20, 300_000)
	image := load(t, s, archiveOf(t, spec{name: "localhost/a", layers: [][]byte{gzipped(t, layer)}, diffs: [][]byte{layer}}))[0]
	answers := make(chan string, 4)
	for range cap(answers) {
		go func() {
			out, err := command(t.Context(), "once", s.dir, image.Digest).CombinedOutput()
			if err != nil {
				t.Errorf("%v: %s", err, out)
			}
			answers <- string(out)
		}()
	}
	var all []string
	for range cap(answers) {
		all = append(all, <-answers)
	}
	if len(slices.Compact(all)) != 1 || all[0] == "" {
		t.Errorf("they got different files: %v", all)
	}
	wantWhole(t, s.dir)
}
