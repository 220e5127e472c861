package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// guestdName is the file that installGuestd makes in the folder it returns.
const guestdName = "guestd"

// installGuestd copies guestd to a folder of the state directory, which
// containers have mounted, and returns that folder. There it stays while the
// agent itself is replaced, and each start of a container gets the newest.
// from may be empty: the one beside this program.
//
// The folder is returned, and its guestd of before stays, if there is an error.
func installGuestd(from, stateDir string) (dir string, err error) {
	dir = filepath.Join(stateDir, "guestd")
	if from == "" {
		if from, err = beside(guestdName); err != nil {
			return dir, err
		}
	}
	program, err := os.ReadFile(from)
	if err != nil {
		return dir, fmt.Errorf("%w; install guestd beside the agent, or name it with --guestd", err)
	}
	installed := filepath.Join(dir, guestdName)
	if had, err := os.ReadFile(installed); err == nil && bytes.Equal(had, program) {
		return dir, nil
	}
	// Whoever a workload runs as has to be able to read it.
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return dir, err
	}
	return dir, replaceProgram(installed, program)
}

// beside is the path of what is installed with this program, in its folder.
func beside(name string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	if self, err = filepath.EvalSymlinks(self); err != nil {
		return "", err
	}
	return filepath.Join(filepath.Dir(self), name), nil
}

// replaceProgram replaces a file in one step: what runs from the old one goes
// on doing so.
func replaceProgram(name string, content []byte) (err error) {
	file, err := os.CreateTemp(filepath.Dir(name), ".new-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(file.Name()))
		}
	}()
	_, err = file.Write(content)
	err = errors.Join(err, file.Chmod(0o755), file.Sync(), file.Close())
	if err != nil {
		return err
	}
	return os.Rename(file.Name(), name)
}
