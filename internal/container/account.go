package container

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"github.com/containers/podman/v5/pkg/bindings/containers"
	"github.com/containers/podman/v5/pkg/domain/entities/types"
	"github.com/containers/podman/v5/pkg/specgen"

	"github.com/choiros/agent/internal/account"
	"github.com/choiros/agent/internal/sandbox"
)

// accountCache remembers the accounts of images, which never change: an image
// is known by its digest.
type accountCache struct {
	mu    sync.Mutex
	known map[accountKey]account.ID
}

type accountKey struct{ image, user string }

func (c *accountCache) load(key accountKey) (account.ID, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, ok := c.known[key]
	return a, ok
}

func (c *accountCache) store(key accountKey, a account.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil || len(c.known) > 1000 {
		c.known = map[accountKey]account.ID{}
	}
	c.known[key] = a
}

// account returns whom a workload of an image runs as, when its user is that.
func (d *Driver) account(ctx context.Context, id string, image *types.ImageInspectReport, user string) (account.ID, error) {
	if a, ok := account.Of(user); ok {
		return a, nil
	}
	key := accountKey{image.ID, user}
	if a, ok := d.accounts.load(key); ok {
		return a, nil
	}
	var passwd, group string
	err := d.settle(ctx, createLimit, func(ctx context.Context) (err error) {
		passwd, group, err = d.readAccounts(ctx, id, image.ID, strings.Contains(user, ":"))
		return err
	})
	if err != nil {
		return account.ID{}, fmt.Errorf("read the users of the image: %w", err)
	}
	a, err := account.In(user, passwd, group)
	if err != nil {
		return account.ID{}, sandbox.Invalidf("spec.user", "%s: %s", user, err)
	}
	d.accounts.store(key, a)
	return a, nil
}

// readAccounts reads an image's passwd and, if asked for, group file. Podman shows files of
// containers only, so it makes one, which never runs, and removes it. If it is
// left behind it is found under the sandbox's id.
func (d *Driver) readAccounts(ctx context.Context, id, image string, groups bool) (passwd, group string, err error) {
	spec := specgen.NewSpecGenerator(image, false)
	spec.Name = d.name(id) + lookupMark + strings.ToLower(rand.Text()[:8])
	spec.Labels = map[string]string{labelOwner: d.cfg.Owner, labelSandbox: id}
	spec.NetNS = specgen.Namespace{NSMode: specgen.NoNetwork}
	spec.ImageVolumeMode = "ignore"
	made, err := containers.CreateWithSpec(ctx, spec, nil)
	if err != nil {
		return "", "", err
	}
	defer func() {
		_, removed := containers.Remove(ctx, made.ID, new(containers.RemoveOptions).WithForce(true).WithIgnore(true))
		err = errors.Join(err, removed)
	}()
	if passwd, err = readFile(ctx, made.ID, "/etc/passwd"); err != nil || !groups {
		return passwd, "", err
	}
	group, err = readFile(ctx, made.ID, "/etc/group")
	return passwd, group, err
}

// accountFileLimit bounds what is read of a passwd or group file.
const accountFileLimit = 1 << 20

// readFile reads a file of a container; one that is not there is empty.
func readFile(ctx context.Context, container, path string) (string, error) {
	var buffer bytes.Buffer
	copyFile, err := containers.CopyToArchive(ctx, container, path, &limitedWriter{&buffer, accountFileLimit + 4<<10})
	if err != nil {
		if errors.Is(translate(err), sandbox.ErrNotFound) {
			return "", nil
		}
		return "", err
	}
	if err := copyFile(); err != nil {
		return "", err
	}
	archive := tar.NewReader(&buffer)
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return "", nil
		}
		if err != nil {
			return "", fmt.Errorf("%s: %w", path, err)
		}
		if header.Typeflag == tar.TypeReg {
			text, err := io.ReadAll(archive)
			return string(text), err
		}
	}
}

// limitedWriter takes so many bytes and then fails.
type limitedWriter struct {
	to   io.Writer
	left int
}

func (w *limitedWriter) Write(p []byte) (int, error) {
	if len(p) > w.left {
		return 0, errors.New("is too large")
	}
	w.left -= len(p)
	return w.to.Write(p)
}
