//go:build linux

package guestd

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

// takeSecrets writes the secrets that are files, and returns the others as
// environment. Nothing is written unless all can be taken.
func (w *workload) takeSecrets(secrets []*guestv1.Secret) ([]string, error) {
	var env []string
	var files []*guestv1.Secret
	for _, secret := range secrets {
		name := secret.GetName()
		if secret.GetFile() {
			if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > unix.NAME_MAX {
				return nil, failuref(guestv1.Failure_CODE_INVALID, "secret %.64q: not a file's name", name)
			}
			files = append(files, secret)
			continue
		}
		if err := checkVariable(name); err != nil {
			return nil, err
		}
		if bytes.IndexByte(secret.GetValue(), 0) >= 0 {
			return nil, failuref(guestv1.Failure_CODE_INVALID, "secret %.64q: the value has a zero byte, which environment cannot hold", name)
		}
		env = append(env, name+"="+string(secret.GetValue()))
	}
	if len(files) > 0 {
		if err := writeSecrets(w.secretsDir, files, w.account); err != nil {
			return nil, fmt.Errorf("secrets as files: %w", err)
		}
	}
	return env, nil
}

// changed returns the names of the secrets whose values are not those that the
// sandbox has.
func (w *workload) changed(secrets []*guestv1.Secret) []string {
	w.mu.Lock()
	env := w.env
	w.mu.Unlock()
	var names []string
	for _, secret := range secrets {
		same := false
		if secret.GetFile() {
			had, err := readSecret(w.secretsDir, secret.GetName())
			same = err == nil && bytes.Equal(had, secret.GetValue())
		} else {
			same = slices.Contains(env, secret.GetName()+"="+string(secret.GetValue()))
		}
		if !same {
			names = append(names, secret.GetName())
		}
	}
	return names
}

func readSecret(dir, name string) ([]byte, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	return root.ReadFile(name)
}

// writeSecrets replaces files in dir, each in one step. dir must be in memory.
// They are the owner's, or guestd's own if that is nil.
func writeSecrets(dir string, secrets []*guestv1.Secret, owner *account) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := checkMemory(root); err != nil {
		return err
	}
	for _, secret := range secrets {
		if err := writeSecret(root, secret, owner); err != nil {
			return err
		}
	}
	return nil
}

// checkMemory refuses a folder whose files could reach a disk.
func checkMemory(root *os.Root) error {
	folder, err := root.Open(".")
	if err != nil {
		return err
	}
	defer folder.Close()
	var stat unix.Statfs_t
	if err := unix.Fstatfs(int(folder.Fd()), &stat); err != nil {
		return err
	}
	if stat.Type != unix.TMPFS_MAGIC && stat.Type != unix.RAMFS_MAGIC {
		return failuref(guestv1.Failure_CODE_STATE, "%s is not a tmpfs, and secrets are not written to disks", root.Name())
	}
	return nil
}

func writeSecret(root *os.Root, secret *guestv1.Secret, owner *account) error {
	temporary := "." + rand.Text()
	file, err := root.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o400)
	if err != nil {
		return err
	}
	_, err = file.Write(secret.GetValue())
	if err == nil && owner != nil {
		err = file.Chown(int(owner.uid), int(owner.gid))
	}
	err = errors.Join(err, file.Close())
	if err == nil {
		err = root.Rename(temporary, secret.GetName())
	}
	if err != nil {
		return errors.Join(err, root.Remove(temporary))
	}
	return nil
}

// environmentOf is a map as NAME=VALUE, in the order of the names.
func environmentOf(variables map[string]string) ([]string, error) {
	env := make([]string, 0, len(variables))
	for _, name := range slices.Sorted(maps.Keys(variables)) {
		if err := checkVariable(name); err != nil {
			return nil, err
		}
		if strings.Contains(variables[name], "\x00") {
			return nil, failuref(guestv1.Failure_CODE_INVALID, "env %.64q: the value has a zero byte", name)
		}
		env = append(env, name+"="+variables[name])
	}
	return env, nil
}

func checkVariable(name string) error {
	if name == "" || strings.ContainsAny(name, "=\x00") {
		return failuref(guestv1.Failure_CODE_INVALID, "%.64q is no name for a variable", name)
	}
	return nil
}

// merge returns a new environment: base with variables set on top, the last of
// each name.
func merge(base, variables []string) []string {
	merged := make([]string, 0, len(base)+len(variables))
	index := make(map[string]int, cap(merged))
	for _, list := range [][]string{base, variables} {
		for _, variable := range list {
			name, _, _ := strings.Cut(variable, "=")
			if i, there := index[name]; there {
				merged[i] = variable
				continue
			}
			index[name] = len(merged)
			merged = append(merged, variable)
		}
	}
	return merged
}

// variable returns the value of one in an environment; empty: none.
func variable(env []string, name string) string {
	for _, v := range env {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value
		}
	}
	return ""
}
