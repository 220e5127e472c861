package image

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/erofs/go-erofs"
)

// maxUsers is how much is read of a table of users or groups, in bytes.
const maxUsers = 1 << 20

// Users returns the texts of the tables of users and groups in a root file
// system, the file at path; see passwd(5) and group(5). One that is not there,
// or is no regular file, is empty.
func Users(path string) (passwd, group string, err error) {
	file, err := os.Open(path)
	if err != nil {
		return "", "", err
	}
	defer file.Close()
	root, err := erofs.Open(file)
	if err != nil {
		return "", "", fmt.Errorf("read %s: %w", path, err)
	}
	if passwd, err = readTable(root, "etc/passwd"); err == nil {
		group, err = readTable(root, "etc/group")
	}
	if err != nil {
		return "", "", fmt.Errorf("read %s: %w", path, err)
	}
	return passwd, group, nil
}

func readTable(root fs.FS, name string) (string, error) {
	file, err := root.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer file.Close()
	if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() {
		return "", err
	}
	text, err := io.ReadAll(io.LimitReader(file, maxUsers))
	return string(text), err
}
