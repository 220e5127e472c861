package files

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

const (
	maxWatches = 4096 // folders
	// quiet is the least time between two messages, unless one is full.
	quiet = 50 * time.Millisecond

	watched = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
		unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
	watchBelow = watched | unix.IN_ONLYDIR | unix.IN_DONT_FOLLOW
)

// WatchFiles serves a call. Several changes of one file are told as one; a new
// name is CREATED also where it replaces another file, and what is found in a
// new folder may be told twice. When the path itself is gone, the last change
// is its REMOVED and the call ends with NOT_FOUND.
func (s *Service) WatchFiles(ctx context.Context, conn *wire.Conn, call *guestv1.WatchFiles) error {
	if err := check(call.GetPath()); err != nil {
		return err
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return translate(os.NewSyscallError("inotify_init", err))
	}
	w := &watcher{
		fd: fd, queue: os.NewFile(uintptr(fd), "inotify"), recursive: call.GetRecursive(),
		paths: map[int]string{}, pending: pending{kinds: map[string]guestv1.FileChange_Kind{}}, conn: conn,
	}
	defer w.queue.Close()
	if err := w.begin(call.GetPath()); err != nil {
		return translate(err)
	}
	defer conn.Bind(ctx)()
	defer context.AfterFunc(ctx, func() { w.queue.Close() })()
	if err := succeed(conn, &guestv1.Response{}); err != nil {
		return err
	}
	if err := w.run(); ctx.Err() == nil {
		return translate(err)
	}
	return ctx.Err()
}

// watcher is one WatchFiles at work.
type watcher struct {
	fd        int
	queue     *os.File // of fd
	recursive bool
	root      int            // the descriptor of the watch of the path itself
	paths     map[int]string // of what is watched, by descriptors of watches
	pending   pending
	conn      *wire.Conn
	sent      time.Time
}

// begin watches a path. Nothing that is there is told.
func (w *watcher) begin(p string) error {
	if err := w.watch(p, watched); err != nil {
		return err
	}
	for wd := range w.paths {
		w.root = wd
	}
	if info, err := os.Stat(p); err != nil || !info.IsDir() || !w.recursive {
		return err
	}
	return w.descend(p, false)
}

func (w *watcher) watch(p string, mask uint32) error {
	if len(w.paths) >= maxWatches {
		return fail(guestv1.Failure_CODE_EXHAUSTED, "watch %s: %d folders are watched, which is the most", p, maxWatches)
	}
	wd, err := unix.InotifyAddWatch(w.fd, p, mask)
	if err != nil {
		return &fs.PathError{Op: "watch", Path: p, Err: err}
	}
	if wd != w.root { // which can be met again, in a bind mount of itself
		w.paths[wd] = p
	}
	return nil
}

// descend watches the folders in a folder, which is watched already, and tells
// what is there if that is news.
func (w *watcher) descend(p string, news bool) error {
	flags := os.O_RDONLY | folderOnly
	if p != w.paths[w.root] {
		flags |= unix.O_NOFOLLOW
	}
	dir, err := os.OpenFile(p, flags, 0)
	if err != nil {
		return w.passing(err)
	}
	defer dir.Close()
	for {
		entries, err := dir.ReadDir(readdir)
		for _, entry := range entries {
			below := path.Join(p, entry.Name())
			if news {
				if err := w.note(below, guestv1.FileChange_KIND_CREATED); err != nil {
					return err
				}
			}
			if entry.IsDir() {
				if err := w.enter(below, news); err != nil {
					return err
				}
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return w.passing(err)
		}
	}
}

// enter watches a folder below the path.
func (w *watcher) enter(p string, news bool) error {
	// The watch comes first: what appears after it is told by it, what was
	// there before is found.
	if err := w.watch(p, watchBelow); err != nil {
		return w.passing(err)
	}
	return w.descend(p, news)
}

// passing ignores an error about something that has gone away by now, or that
// may not be looked into.
func (w *watcher) passing(err error) error {
	for _, ignored := range []error{fs.ErrNotExist, fs.ErrPermission, unix.ENOTDIR, unix.ELOOP} {
		if errors.Is(err, ignored) {
			return nil
		}
	}
	return err
}

// run tells changes until something fails.
func (w *watcher) run() error {
	buffer := make([]byte, 16<<10) // more than the longest event
	for {
		var deadline time.Time
		if !w.pending.empty() {
			deadline = w.sent.Add(quiet)
		}
		if err := w.queue.SetReadDeadline(deadline); err != nil {
			return err
		}
		n, err := w.queue.Read(buffer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if err := w.flush(); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		if err := w.events(buffer[:n]); err != nil {
			if err := w.flush(); err != nil {
				return err
			}
			return err
		}
		if time.Since(w.sent) >= quiet {
			if err := w.flush(); err != nil {
				return err
			}
		}
	}
}

// events takes what inotify(7) says.
func (w *watcher) events(b []byte) error {
	for len(b) >= unix.SizeofInotifyEvent {
		wd := int(int32(binary.NativeEndian.Uint32(b))) //nolint:gosec // It is one.
		mask := binary.NativeEndian.Uint32(b[4:])
		size := int(binary.NativeEndian.Uint32(b[12:]))
		name, _, _ := strings.Cut(string(b[unix.SizeofInotifyEvent:][:size]), "\x00")
		b = b[unix.SizeofInotifyEvent+size:]
		if err := w.event(wd, mask, name); err != nil {
			return err
		}
	}
	return nil
}

func (w *watcher) event(wd int, mask uint32, name string) error {
	if mask&unix.IN_Q_OVERFLOW != 0 {
		return w.overflow()
	}
	p, known := w.paths[wd]
	if !known {
		return nil // of a watch that was given up
	}
	if mask&unix.IN_IGNORED != 0 {
		delete(w.paths, wd)
	}
	if name == "" {
		return w.self(wd, p, mask)
	}
	p = path.Join(p, name)
	kind := guestv1.FileChange_KIND_CHANGED
	switch {
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		kind = guestv1.FileChange_KIND_CREATED
	case mask&(unix.IN_DELETE|unix.IN_MOVED_FROM) != 0:
		kind = guestv1.FileChange_KIND_REMOVED
	}
	if mask&unix.IN_ISDIR != 0 && mask&unix.IN_MOVED_FROM != 0 {
		w.forget(p)
	}
	if err := w.note(p, kind); err != nil {
		return err
	}
	if w.recursive && mask&unix.IN_ISDIR != 0 && kind == guestv1.FileChange_KIND_CREATED {
		return w.enter(p, true)
	}
	return nil
}

// self takes an event about something watched itself. Of a folder below the
// path its parent's watch tells as well.
func (w *watcher) self(wd int, p string, mask uint32) error {
	if wd != w.root {
		return nil
	}
	gone := mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_UNMOUNT|unix.IN_IGNORED) != 0
	if !gone && mask&unix.IN_ATTRIB != 0 {
		// A file that someone still has open is not deleted yet, only its name.
		_, err := os.Stat(p)
		gone = errors.Is(err, fs.ErrNotExist)
	}
	if !gone {
		return w.note(p, guestv1.FileChange_KIND_CHANGED)
	}
	if err := w.note(p, guestv1.FileChange_KIND_REMOVED); err != nil {
		return err
	}
	return fail(guestv1.Failure_CODE_NOT_FOUND, "%s is there no more", p)
}

// overflow begins anew after the kernel has dropped events: folders may have
// come that are not watched.
func (w *watcher) overflow() error {
	w.pending.lost = true
	root := w.paths[w.root]
	if _, err := os.Stat(root); err != nil {
		return w.self(w.root, root, unix.IN_DELETE_SELF)
	}
	if !w.recursive {
		return nil
	}
	w.forget(root)
	return w.descend(root, false)
}

// forget ends the watches of a folder that has another name now and of what is
// in it; the watch of the path itself stays.
func (w *watcher) forget(p string) {
	for wd, watchedPath := range w.paths {
		if wd != w.root && (watchedPath == p || strings.HasPrefix(watchedPath, strings.TrimSuffix(p, "/")+"/")) {
			_, _ = unix.InotifyRmWatch(w.fd, uint32(wd)) //nolint:gosec // It may be gone; it is not negative.
			delete(w.paths, wd)
		}
	}
}

// note remembers a change, and tells all if that is as many as can be told.
func (w *watcher) note(p string, kind guestv1.FileChange_Kind) error {
	if w.pending.add(p, kind); !w.pending.full() {
		return nil
	}
	return w.flush()
}

func (w *watcher) flush() error {
	if w.pending.empty() {
		return nil
	}
	w.sent = time.Now()
	return w.conn.Send(w.pending.take())
}
