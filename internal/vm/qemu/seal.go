//go:build linux

package qemu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"filippo.io/age"

	"github.com/choiros/agent/internal/vm"
)

// seal writes what comes from plain to file, so that only the key that it
// returns opens it, and syncs it.
func seal(file *os.File, plain io.Reader, identity *age.X25519Identity) error {
	sealed, err := age.Encrypt(file, identity.Recipient())
	if err != nil {
		return fmt.Errorf("seal the state: %w", err)
	}
	if _, err := io.Copy(sealed, plain); err != nil {
		return fmt.Errorf("seal the state: %w", err)
	}
	if err := sealed.Close(); err != nil {
		return fmt.Errorf("seal the state: %w", err)
	}
	return file.Sync()
}

// unseal writes to plain what key opens of the file at path. A part of it that
// was changed is not written, nor what follows.
func unseal(plain io.Writer, path string, key []byte) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	identity, err := age.ParseX25519Identity(string(key))
	if err != nil {
		return fmt.Errorf("%w: its key is none", vm.ErrCannotSave) // and is not shown
	}
	opened, err := age.Decrypt(file, identity)
	if err != nil {
		return fmt.Errorf("%w: open the state: %w", vm.ErrCannotSave, err)
	}
	_, err = io.Copy(plain, opened)
	switch {
	case errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrClosed):
		return nil // nobody wants the rest, and that is for them to explain
	case err != nil:
		return fmt.Errorf("%w: open the state: %w", vm.ErrCannotSave, err)
	}
	return nil
}

// carried is a pipe to QEMU or from it, with somebody at this end of it.
type carried struct {
	done chan struct{}
	err  error // once done
}

// carry does work on one end of a pipe, and closes that then.
func carry(end *os.File, work func(*os.File) error) *carried {
	c := &carried{done: make(chan struct{})}
	go func() {
		defer close(c.done)
		c.err = work(end)
		_ = end.Close() // it may be closed, to stop the work
	}()
	return c
}

// wait returns once the work is done.
func (c *carried) wait() error {
	<-c.done
	return c.err
}
