package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// How a lock is held, see flock(2).
const (
	shared    = syscall.LOCK_SH
	exclusive = syscall.LOCK_EX
)

// lockPause is how often a lock that another holds is tried. flock(2) can wait
// by itself, but not with a context.
const lockPause = 20 * time.Millisecond

// flock takes the lock of an open file or folder. The kernel releases it when
// the file is closed, by whatever ends the process too.
func flock(ctx context.Context, f *os.File, how int) error {
	for {
		err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB)
		if err == nil || !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lockPause):
		}
	}
}

// locked calls act while the store is locked against other processes and
// against other calls in this one.
func (s *Store) locked(ctx context.Context, how int, act func() error) error {
	f, err := os.OpenFile(s.path("lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := flock(ctx, f, how); err != nil {
		return err
	}
	return act()
}

// stage is a folder below tmp for what is being made. It is locked for as long
// as its maker lives.
type stage struct {
	dir  string
	lock *os.File
}

// newStage makes a folder that nobody else knows.
func (s *Store) newStage(ctx context.Context) (*stage, error) {
	return s.enterStage(ctx, rand.Text())
}

// enterStage returns the folder of that name, empty, once nobody else is in it.
func (s *Store) enterStage(ctx context.Context, name string) (*stage, error) {
	dir := filepath.Join(s.temporary(), name)
	for {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		lock, err := os.Open(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		st := &stage{dir: dir, lock: lock}
		if err := flock(ctx, lock, exclusive); err != nil {
			return nil, errors.Join(err, lock.Close())
		}
		switch ours, err := st.isCurrent(); {
		case err != nil:
			return nil, errors.Join(err, lock.Close())
		case !ours:
			lock.Close() // whoever was in it has removed it
			continue
		}
		if err := st.clear(); err != nil {
			return nil, errors.Join(err, lock.Close())
		}
		return st, nil
	}
}

// isCurrent reports whether the folder that is locked is still the one of
// that name.
func (st *stage) isCurrent() (bool, error) {
	held, err := st.lock.Stat()
	if err != nil {
		return false, err
	}
	named, err := os.Stat(st.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(held, named), err
}

func (st *stage) clear() error {
	entries, err := os.ReadDir(st.dir)
	for _, entry := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(st.dir, entry.Name())))
	}
	return err
}

// close removes the folder with all that is in it.
func (st *stage) close() error {
	return errors.Join(os.RemoveAll(st.dir), st.lock.Close())
}

// create makes a file in the folder.
func (st *stage) create(name string) (*os.File, error) {
	return os.OpenFile(filepath.Join(st.dir, name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
}

// removeStale removes the folders whose makers are dead.
func (s *Store) removeStale() error {
	entries, err := os.ReadDir(s.temporary())
	for _, entry := range entries {
		err = errors.Join(err, removeIfStale(filepath.Join(s.temporary(), entry.Name())))
	}
	return err
}

func removeIfStale(dir string) error {
	lock, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil
	}
	if err != nil {
		return err
	}
	ours, err := (&stage{dir: dir, lock: lock}).isCurrent()
	if err != nil || !ours {
		return err
	}
	return os.RemoveAll(dir)
}

// replaceFile replaces a file of the store's folder, atomically and durably.
// The caller has the exclusive lock.
func (s *Store) replaceFile(name string, content []byte) error {
	st, err := s.newStage(context.Background())
	if err != nil {
		return err
	}
	temporary := filepath.Join(st.dir, name)
	err = os.WriteFile(temporary, content, 0o600)
	if err == nil {
		err = syncPath(temporary)
	}
	if err == nil {
		err = publish(temporary, s.path(name))
	}
	return errors.Join(err, st.close())
}

// publish gives a finished file, which is on the disk, its name, durably.
func publish(temporary, path string) error {
	if err := os.Rename(temporary, path); err != nil {
		return err
	}
	return syncPath(filepath.Dir(path))
}

// syncPath brings a file or a folder to the disk.
func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// diskProblem says of an error whether the disk is full.
func diskProblem(err error) error {
	for _, full := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG} {
		if errors.Is(err, full) && !errors.Is(err, sandbox.ErrExhausted) {
			return fmt.Errorf("%w: %w", sandbox.ErrExhausted, err)
		}
	}
	return err
}
