package container

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"

	"github.com/containers/podman/v5/pkg/bindings/containers"
	"github.com/containers/podman/v5/pkg/domain/entities/types"
	"github.com/containers/podman/v5/pkg/specgen"

	"github.com/choiros/agent/internal/sandbox"
)

// account is the user and primary group that a workload runs as, by number.
type account struct{ uid, gid uint32 }

// accountOf resolves user[:group] as far as that needs no image.
func accountOf(user string) (a account, resolved bool) {
	name, group, hasGroup := strings.Cut(user, ":")
	if name == "" || name == "root" || name == "0" {
		if !hasGroup || group == "" || group == "root" || group == "0" {
			return account{}, true
		}
	}
	uid, uidErr := strconv.ParseUint(name, 10, 32)
	gid, gidErr := strconv.ParseUint(group, 10, 32)
	return account{uint32(uid), uint32(gid)}, uidErr == nil && gidErr == nil
}

// accountIn resolves user[:group] by the image's passwd and group files, in
// the way that Podman does when it starts the container.
func accountIn(user, passwd, group string) (account, error) {
	name, groupName, hasGroup := strings.Cut(user, ":")
	var a account
	entry := entryOf(passwd, name, 2)
	switch uid, err := strconv.ParseUint(name, 10, 32); {
	case len(entry) > 3:
		uid, err1 := strconv.ParseUint(entry[2], 10, 32)
		gid, err2 := strconv.ParseUint(entry[3], 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			return a, fmt.Errorf("the image's /etc/passwd has a malformed entry for user %s", name)
		}
		a = account{uint32(uid), uint32(gid)}
	case name == "" || name == "root":
	case err == nil:
		a.uid = uint32(uid)
	default:
		return a, fmt.Errorf("the image's /etc/passwd has no user %s", name)
	}
	if !hasGroup || groupName == "" {
		return a, nil
	}
	gidText := groupName
	if entry := entryOf(group, groupName, 2); len(entry) > 2 {
		gidText = entry[2]
	}
	gid, err := strconv.ParseUint(gidText, 10, 32)
	if err != nil {
		return a, fmt.Errorf("the image's /etc/group has no group %s", groupName)
	}
	a.gid = uint32(gid)
	return a, nil
}

// entryOf finds the line of a passwd(5) or group(5) file that has a name, or
// that has it as its number, which is the given field.
func entryOf(file, name string, number int) []string {
	var byNumber []string
	for line := range strings.Lines(file) {
		fields := strings.Split(strings.TrimRight(line, "\r\n"), ":")
		if len(fields) <= number || name == "" {
			continue
		}
		if fields[0] == name {
			return fields
		}
		if byNumber == nil && fields[number] == name {
			byNumber = fields
		}
	}
	return byNumber
}

// accountCache remembers the accounts of images, which never change: an image
// is known by its digest.
type accountCache struct {
	mu    sync.Mutex
	known map[accountKey]account
}

type accountKey struct{ image, user string }

func (c *accountCache) load(key accountKey) (account, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, ok := c.known[key]
	return a, ok
}

func (c *accountCache) store(key accountKey, a account) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil || len(c.known) > 1000 {
		c.known = map[accountKey]account{}
	}
	c.known[key] = a
}

// account returns whom a workload of an image runs as, when its user is that.
func (d *Driver) account(ctx context.Context, id string, image *types.ImageInspectReport, user string) (account, error) {
	if a, ok := accountOf(user); ok {
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
		return account{}, fmt.Errorf("read the users of the image: %w", err)
	}
	a, err := accountIn(user, passwd, group)
	if err != nil {
		return account{}, sandbox.Invalidf("spec.user", "%s: %s", user, err)
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
