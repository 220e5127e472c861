package files_test

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/files"
	"github.com/choiros/agent/internal/guest/wire"
)

const (
	created = guestv1.FileChange_KIND_CREATED
	changed = guestv1.FileChange_KIND_CHANGED
	removed = guestv1.FileChange_KIND_REMOVED
)

// watch starts a WatchFiles and returns its connection, ready.
func watch(t *testing.T, path string, recursive bool) *wire.Conn {
	t.Helper()
	conn, _ := dial(t, call(files.New().WatchFiles, &guestv1.WatchFiles{Path: path, Recursive: recursive}))
	good(t, conn)
	return conn
}

// await receives changes until the last kinds of all paths are those wanted.
func await(t *testing.T, conn *wire.Conn, dir string, want map[string]guestv1.FileChange_Kind) {
	t.Helper()
	check(t, conn.NetConn().SetReadDeadline(time.Now().Add(10*time.Second)))
	got := map[string]guestv1.FileChange_Kind{}
	for !maps.Equal(got, want) {
		var changes guestv1.FileChanges
		if err := conn.ReceiveMessage(&changes); err != nil {
			t.Fatalf("%v; got %v, want %v", err, got, want)
		}
		for _, change := range changes.GetChanges() {
			rel, err := filepath.Rel(dir, change.GetPath())
			check(t, err)
			got[rel] = change.GetKind()
		}
	}
}

func TestWatchTellsChanges(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	old := filepath.Join(dir, "old")
	check(t, os.WriteFile(old, nil, 0o600))
	conn := watch(t, dir, false)
	check(t, os.WriteFile(old, []byte("x"), 0o600))
	await(t, conn, dir, map[string]guestv1.FileChange_Kind{"old": changed})
	check(t, os.Rename(old, filepath.Join(dir, "new")))
	await(t, conn, dir, map[string]guestv1.FileChange_Kind{"old": removed, "new": created})
	check(t, os.Remove(filepath.Join(dir, "new")))
	await(t, conn, dir, map[string]guestv1.FileChange_Kind{"new": removed})
}

func TestWatchFindsWhatIsInNewFolders(t *testing.T) {
	t.Parallel()
	dir, elsewhere := t.TempDir(), t.TempDir()
	check(t, os.MkdirAll(filepath.Join(elsewhere, "sub", "deep"), 0o755))
	check(t, os.WriteFile(filepath.Join(elsewhere, "sub", "deep", "f"), nil, 0o600))
	conn := watch(t, dir, true)
	check(t, os.Rename(filepath.Join(elsewhere, "sub"), filepath.Join(dir, "sub")))
	await(t, conn, dir, map[string]guestv1.FileChange_Kind{"sub": created, "sub/deep": created, "sub/deep/f": created})
	check(t, os.WriteFile(filepath.Join(dir, "sub", "deep", "f"), []byte("x"), 0o600))
	await(t, conn, dir, map[string]guestv1.FileChange_Kind{"sub/deep/f": changed})

	// Under its new name a folder is watched on.
	check(t, os.Rename(filepath.Join(dir, "sub"), filepath.Join(dir, "moved")))
	await(t, conn, dir, map[string]guestv1.FileChange_Kind{"sub": removed, "moved": created, "moved/deep": created, "moved/deep/f": created})
	check(t, os.Remove(filepath.Join(dir, "moved", "deep", "f")))
	await(t, conn, dir, map[string]guestv1.FileChange_Kind{"moved/deep/f": removed})
}

func TestWatchEndsWithItsPath(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"folder", "file"} {
		dir := t.TempDir()
		p := filepath.Join(dir, name)
		if name == "folder" {
			check(t, os.Mkdir(p, 0o755))
		} else {
			check(t, os.WriteFile(p, nil, 0o600))
		}
		conn := watch(t, p, true)
		check(t, os.Remove(p))
		await(t, conn, dir, map[string]guestv1.FileChange_Kind{name: removed})
		bad(t, conn, guestv1.Failure_CODE_NOT_FOUND)
	}
}

func TestBusyFileDoesNotFlood(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "log"))
	check(t, err)
	defer f.Close()
	conn := watch(t, dir, false)
	began := time.Now()
	for range 20_000 {
		_, err := f.Write([]byte("line\n"))
		check(t, err)
	}
	check(t, os.WriteFile(filepath.Join(dir, "end"), nil, 0o600))
	check(t, conn.NetConn().SetReadDeadline(time.Now().Add(20*time.Second)))
	messages := 0
	for end := false; !end; messages++ {
		var changes guestv1.FileChanges
		check(t, conn.ReceiveMessage(&changes))
		for _, change := range changes.GetChanges() {
			end = end || filepath.Base(change.GetPath()) == "end"
		}
	}
	if most := int(time.Since(began)/(50*time.Millisecond)) + 2; messages > most {
		t.Errorf("%d messages, at most %d expected", messages, most)
	}
}

func TestManyChangesComeInBatches(t *testing.T) {
	t.Parallel()
	dir, elsewhere := t.TempDir(), t.TempDir()
	want := map[string]guestv1.FileChange_Kind{"sub": created}
	check(t, os.Mkdir(filepath.Join(elsewhere, "sub"), 0o755))
	for i := range 2000 {
		name := filepath.Join("sub", fmt.Sprintf("%s%d", bytes.Repeat([]byte("n"), 100), i))
		check(t, os.WriteFile(filepath.Join(elsewhere, name), nil, 0o600))
		want[name] = created
	}
	conn := watch(t, dir, true)
	check(t, os.Rename(filepath.Join(elsewhere, "sub"), filepath.Join(dir, "sub")))
	await(t, conn, dir, want)
}

func TestTooManyFoldersAreExhausted(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for i := range 4096 {
		check(t, os.Mkdir(filepath.Join(dir, fmt.Sprint(i)), 0o755))
	}
	conn, _ := dial(t, call(files.New().WatchFiles, &guestv1.WatchFiles{Path: dir, Recursive: true}))
	bad(t, conn, guestv1.Failure_CODE_EXHAUSTED)
	conn, _ = dial(t, call(files.New().WatchFiles, &guestv1.WatchFiles{Path: filepath.Join(dir, "none")}))
	bad(t, conn, guestv1.Failure_CODE_NOT_FOUND)
}
