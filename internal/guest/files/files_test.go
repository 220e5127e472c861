package files_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/files"
	"github.com/choiros/agent/internal/guest/wire"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// dial starts a handler on one end of a unix socket and returns the other. It
// answers what the handler returns as guestd does; ended is closed afterwards.
func dial(t *testing.T, handle func(ctx context.Context, conn *wire.Conn) error) (client *wire.Conn, ended chan struct{}) {
	t.Helper()
	dir, err := os.MkdirTemp("", "files")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	listener, err := net.Listen("unix", filepath.Join(dir, "s"))
	check(t, err)
	defer listener.Close()
	near, err := net.Dial("unix", listener.Addr().String())
	check(t, err)
	far, err := listener.Accept()
	check(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended = make(chan struct{})
	go func() {
		defer close(ended)
		conn := wire.New(far, wire.MaxFrame)
		defer conn.Close()
		err := handle(ctx, conn)
		failure := &guestv1.Failure{Message: fmt.Sprint(err)}
		if said, ok := errors.AsType[*wire.FailureError](err); ok {
			failure = said.Failure
		} else if errors.Is(err, fs.ErrNotExist) {
			failure.Code = guestv1.Failure_CODE_NOT_FOUND
		} else if errors.Is(err, fs.ErrExist) {
			failure.Code = guestv1.Failure_CODE_EXISTS
		}
		if err != nil {
			_ = conn.Send(&guestv1.Response{Failure: failure})
		}
	}()
	t.Cleanup(func() {
		cancel()
		near.Close()
		<-ended
	})
	return wire.New(near, wire.MaxFromGuest), ended
}

func answer(t *testing.T, conn *wire.Conn) *guestv1.Response {
	t.Helper()
	var response guestv1.Response
	check(t, conn.ReceiveMessage(&response))
	return &response
}

// good returns a Response that is no failure.
func good(t *testing.T, conn *wire.Conn) *guestv1.Response {
	t.Helper()
	response := answer(t, conn)
	if response.GetFailure() != nil || response.GetProtocol() != wire.Protocol {
		t.Fatalf("got %v", response)
	}
	return response
}

func bad(t *testing.T, conn *wire.Conn, code guestv1.Failure_Code) {
	t.Helper()
	if response := answer(t, conn); response.GetFailure().GetCode() != code || response.GetFailure() == nil {
		t.Errorf("got %v, want %v", response, code)
	}
}

// call binds a handler to what it is asked.
func call[M any](handler func(context.Context, *wire.Conn, M) error, m M) func(context.Context, *wire.Conn) error {
	return func(ctx context.Context, conn *wire.Conn) error { return handler(ctx, conn, m) }
}

func TestOddPathsAreInvalid(t *testing.T) {
	t.Parallel()
	s := files.New()
	for _, p := range []string{"", "x", "/a/../b", "/a/", "//a", "/a\x00b"} {
		for _, handler := range []func(context.Context, *wire.Conn) error{
			call(s.StatFile, &guestv1.StatFile{Path: p}), call(s.ListFiles, &guestv1.ListFiles{Path: p}),
			call(s.ReadFile, &guestv1.ReadFile{Path: p}), call(s.WriteFile, &guestv1.WriteFile{Path: p}),
			call(s.Pack, &guestv1.Pack{Path: p}), call(s.Unpack, &guestv1.Unpack{Path: p}),
			call(s.WatchFiles, &guestv1.WatchFiles{Path: p}), call(s.RemoveFile, &guestv1.RemoveFile{Path: p}),
			call(s.MakeFolder, &guestv1.MakeFolder{Path: p}),
		} {
			conn, _ := dial(t, handler)
			bad(t, conn, guestv1.Failure_CODE_INVALID)
		}
	}
}

func read(t *testing.T, m *guestv1.ReadFile) string {
	t.Helper()
	conn, _ := dial(t, call(files.New().ReadFile, m))
	good(t, conn)
	content, err := io.ReadAll(conn.Reader())
	check(t, err)
	good(t, conn)
	return string(content)
}

func TestReadsParts(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "f")
	content := strings.Repeat("0123456789", 20_000)
	check(t, os.WriteFile(file, []byte(content), 0o600))
	for _, c := range []struct {
		offset, length uint64
		want           string
	}{
		{0, 0, content},
		{7, 5, content[7:12]},
		{199_990, 100, content[199_990:]},
		{500_000, 0, ""},
		{3, 150_000, content[3:150_003]},
	} {
		if got := read(t, &guestv1.ReadFile{Path: file, Offset: c.offset, Length: c.length}); got != c.want {
			t.Errorf("%d+%d: got %d bytes, want %d", c.offset, c.length, len(got), len(c.want))
		}
	}
	if runtime.GOOS == "linux" {
		if got := read(t, &guestv1.ReadFile{Path: "/proc/self/status"}); !strings.Contains(got, "VmRSS") {
			t.Errorf("of /proc: %q", got)
		}
	}
	conn, _ := dial(t, call(files.New().ReadFile, &guestv1.ReadFile{Path: file, Offset: 1 << 63}))
	bad(t, conn, guestv1.Failure_CODE_INVALID)
}

func TestReadsFilesAlone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	check(t, syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600))
	for _, p := range []string{filepath.Join(dir, "pipe"), dir, "/dev/zero"} {
		conn, _ := dial(t, call(files.New().ReadFile, &guestv1.ReadFile{Path: p}))
		bad(t, conn, guestv1.Failure_CODE_INVALID)
	}
	conn, _ := dial(t, call(files.New().ReadFile, &guestv1.ReadFile{Path: filepath.Join(dir, "none")}))
	bad(t, conn, guestv1.Failure_CODE_NOT_FOUND)
}

func TestSlowReaderHoldsNoMemory(t *testing.T) { //nolint:paralleltest // Measures the whole process.
	file := filepath.Join(t.TempDir(), "big")
	check(t, os.WriteFile(file, nil, 0o600))
	check(t, os.Truncate(file, 1<<40))
	s := files.New()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range 20 {
		conn, _ := dial(t, call(s.ReadFile, &guestv1.ReadFile{Path: file}))
		good(t, conn)
		for range 10 {
			_, _, err := conn.Receive()
			check(t, err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 20*(400<<10) {
		t.Errorf("20 calls hold %d bytes", grown)
	}
}

func write(t *testing.T, m *guestv1.WriteFile, content string) *guestv1.Response {
	t.Helper()
	conn, _ := dial(t, call(files.New().WriteFile, m))
	good(t, conn)
	if content != "" {
		check(t, conn.SendData(wire.KindData, []byte(content)))
	}
	check(t, conn.SendData(wire.KindData, nil))
	return answer(t, conn)
}

func TestWriteReplacesAndKeepsTheMode(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, link := filepath.Join(dir, "sub", "f"), filepath.Join(dir, "link")
	check(t, os.Symlink("sub/f", link)) // dangling at first
	content := strings.Repeat("x", 100_000)
	got := write(t, &guestv1.WriteFile{Path: file, Parents: true}, content).GetTransferred()
	if got.GetFiles() != 1 || got.GetBytes() != 100_000 {
		t.Errorf("got %v", got)
	}
	mode := func() fs.FileMode {
		info, err := os.Lstat(file)
		check(t, err)
		return info.Mode()
	}
	if mode() != 0o644 {
		t.Errorf("a new file has mode %v", mode())
	}
	check(t, os.Chmod(file, 0o751))
	write(t, &guestv1.WriteFile{Path: link}, "y")
	if info, err := os.Lstat(link); err != nil || info.Mode().Type() != fs.ModeSymlink || mode() != 0o751 {
		t.Errorf("got %v, %v, %v", info.Mode(), err, mode())
	}
	if content, err := os.ReadFile(file); err != nil || string(content) != "y" {
		t.Errorf("got %q, %v", content, err)
	}
	asked := uint32(0o4600)
	write(t, &guestv1.WriteFile{Path: file, Mode: &asked}, "")
	if mode() != 0o600|fs.ModeSetuid {
		t.Errorf("got %v", mode())
	}
	if entries, _ := os.ReadDir(filepath.Join(dir, "sub")); len(entries) != 1 {
		t.Errorf("got %v", entries)
	}
	conn, _ := dial(t, call(files.New().WriteFile, &guestv1.WriteFile{Path: dir}))
	bad(t, conn, guestv1.Failure_CODE_INVALID)
}

func TestCutWriteLeavesTheFileAsItWas(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	check(t, os.WriteFile(file, []byte("before"), 0o600))
	conn, ended := dial(t, call(files.New().WriteFile, &guestv1.WriteFile{Path: file}))
	good(t, conn)
	check(t, conn.SendData(wire.KindData, bytes.Repeat([]byte("x"), 300_000)))
	conn.Close()
	<-ended
	entries, err := os.ReadDir(dir)
	check(t, err)
	content, _ := os.ReadFile(file)
	if len(entries) != 1 || string(content) != "before" {
		t.Errorf("got %v, %q", entries, content)
	}
}

func TestListsInPages(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const many = 2500
	for i := range many {
		check(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%05d", i)), nil, 0o600))
	}
	check(t, os.WriteFile(filepath.Join(dir, "not\xffutf8"), nil, 0o600))
	var names []string
	for more := true; more; {
		after := ""
		if len(names) > 0 {
			after = names[len(names)-1]
		}
		conn, _ := dial(t, call(files.New().ListFiles, &guestv1.ListFiles{Path: dir, After: after}))
		page := good(t, conn).GetFiles()
		for _, file := range page.GetFiles() {
			names = append(names, file.GetName())
		}
		more = page.GetMore()
	}
	if len(names) != many+1 || names[0] != "00000" || names[many-1] != "02499" || names[many] != "not\uFFFDutf8" {
		t.Errorf("got %d names, the last %q", len(names), names[len(names)-1])
	}
}

// What is listed must fit in what the agent takes, however long links are.
func TestPageOfLongLinksIsShort(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for i := range 600 {
		check(t, os.Symlink(strings.Repeat("t", 4000), filepath.Join(dir, fmt.Sprintf("%03d", i))))
	}
	conn, _ := dial(t, call(files.New().ListFiles, &guestv1.ListFiles{Path: dir}))
	if page := good(t, conn).GetFiles(); !page.GetMore() || len(page.GetFiles()) < 100 {
		t.Errorf("%d files, more %v", len(page.GetFiles()), page.GetMore())
	}
}

func TestRemoveAndMakeFolder(t *testing.T) {
	t.Parallel()
	s, dir := files.New(), t.TempDir()
	deep := filepath.Join(dir, "a", "b", "c")
	ask := func(handler func(context.Context, *wire.Conn) error) *wire.Conn {
		conn, _ := dial(t, handler)
		return conn
	}
	bad(t, ask(call(s.MakeFolder, &guestv1.MakeFolder{Path: deep})), guestv1.Failure_CODE_NOT_FOUND)
	good(t, ask(call(s.MakeFolder, &guestv1.MakeFolder{Path: deep, Mode: 0o1777, Parents: true})))
	good(t, ask(call(s.MakeFolder, &guestv1.MakeFolder{Path: deep, Mode: 0o700})))
	file := good(t, ask(call(s.StatFile, &guestv1.StatFile{Path: deep}))).GetFile()
	if file.GetMode() != 0o1777 || file.GetKind() != guestv1.FileInfo_KIND_FOLDER || file.GetName() != deep {
		t.Errorf("got %v", file)
	}
	kept := filepath.Join(dir, "kept")
	check(t, os.WriteFile(kept, nil, 0o600))
	check(t, os.Symlink(dir, filepath.Join(deep, "link")))
	bad(t, ask(call(s.MakeFolder, &guestv1.MakeFolder{Path: kept})), guestv1.Failure_CODE_EXISTS)
	bad(t, ask(call(s.RemoveFile, &guestv1.RemoveFile{Path: "/", Recursive: true})), guestv1.Failure_CODE_INVALID)
	bad(t, ask(call(s.RemoveFile, &guestv1.RemoveFile{Path: filepath.Join(dir, "a")})), guestv1.Failure_CODE_STATE)
	good(t, ask(call(s.RemoveFile, &guestv1.RemoveFile{Path: filepath.Join(dir, "a"), Recursive: true})))
	bad(t, ask(call(s.RemoveFile, &guestv1.RemoveFile{Path: filepath.Join(dir, "a"), Recursive: true})), guestv1.Failure_CODE_NOT_FOUND)
	if _, err := os.Stat(kept); err != nil {
		t.Error("a link was followed: ", err)
	}
}

func TestPackedIsUnpacked(t *testing.T) {
	t.Parallel()
	source, dest := filepath.Join(t.TempDir(), "src"), filepath.Join(t.TempDir(), "new", "dest")
	check(t, os.MkdirAll(filepath.Join(source, "sub"), 0o755))
	check(t, os.WriteFile(filepath.Join(source, "sub", "f"), bytes.Repeat([]byte("x"), 1<<20), 0o600))
	check(t, os.Symlink("/anywhere", filepath.Join(source, "link")))
	from, _ := dial(t, call(files.New().Pack, &guestv1.Pack{Path: source}))
	to, _ := dial(t, call(files.New().Unpack, &guestv1.Unpack{Path: dest, Rename: "copy"}))
	if file := good(t, from).GetFile(); file.GetKind() != guestv1.FileInfo_KIND_FOLDER {
		t.Errorf("got %v", file)
	}
	good(t, to)
	_, err := io.Copy(to.Writer(wire.KindData), from.Reader())
	check(t, err)
	good(t, from)
	check(t, to.SendData(wire.KindData, nil))
	if got := good(t, to).GetTransferred(); got.GetFiles() != 4 || got.GetBytes() != 1<<20 {
		t.Errorf("got %v", got)
	}
	if target, err := os.Readlink(filepath.Join(dest, "copy", "link")); err != nil || target != "/anywhere" {
		t.Errorf("got %q, %v", target, err)
	}
}

func TestUnpackRefusesTraversalAndCutStreams(t *testing.T) {
	t.Parallel()
	outer := t.TempDir()
	dest := filepath.Join(outer, "dest")
	for _, name := range []string{"../x", "/x", "out/x"} {
		var stream bytes.Buffer
		w := tar.NewWriter(&stream)
		check(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: "out", Linkname: "../"}))
		check(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600}))
		check(t, w.Close())
		conn, _ := dial(t, call(files.New().Unpack, &guestv1.Unpack{Path: dest}))
		good(t, conn)
		check(t, conn.SendData(wire.KindData, stream.Bytes()))
		bad(t, conn, guestv1.Failure_CODE_INVALID)
	}
	if entries, _ := os.ReadDir(outer); len(entries) != 1 {
		t.Errorf("got %v", entries)
	}

	var stream bytes.Buffer
	w := tar.NewWriter(&stream)
	check(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "cut", Mode: 0o600, Size: 1 << 20}))
	conn, ended := dial(t, call(files.New().Unpack, &guestv1.Unpack{Path: dest}))
	good(t, conn)
	check(t, conn.SendData(wire.KindData, append(stream.Bytes(), make([]byte, 100_000)...)))
	conn.Close()
	<-ended
	if entries, _ := os.ReadDir(dest); len(entries) != 1 || entries[0].Name() != "out" {
		t.Errorf("got %v", entries)
	}
}

func TestStopsWithItsContext(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "big")
	check(t, os.WriteFile(file, nil, 0o600))
	check(t, os.Truncate(file, 1<<40))
	s := files.New()
	for name, handler := range map[string]func(context.Context, *wire.Conn) error{
		"read":   call(s.ReadFile, &guestv1.ReadFile{Path: file}),
		"pack":   call(s.Pack, &guestv1.Pack{Path: filepath.Dir(file)}),
		"write":  call(s.WriteFile, &guestv1.WriteFile{Path: file + "2"}),
		"unpack": call(s.Unpack, &guestv1.Unpack{Path: filepath.Dir(file)}),
	} {
		ctx, cancel := context.WithCancel(t.Context())
		conn, ended := dial(t, func(_ context.Context, conn *wire.Conn) error { return handler(ctx, conn) })
		good(t, conn)
		cancel()
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Errorf("%s goes on", name)
		}
	}
}
