// Package account finds out who user[:group] is, by number, in an image's own
// tables of users and groups; see passwd(5) and group(5). It knows no other
// source: a name that is in neither table is an error, and never the host's.
package account

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// ID is a user and primary group, by number.
type ID struct{ UID, GID uint32 }

// Of resolves user[:group] as far as that needs no image.
func Of(user string) (id ID, resolved bool) {
	name, group, hasGroup := strings.Cut(user, ":")
	if name == "" || name == "root" || name == "0" {
		if !hasGroup || group == "" || group == "root" || group == "0" {
			return ID{}, true
		}
	}
	uid, uidErr := strconv.ParseUint(name, 10, 32)
	gid, gidErr := strconv.ParseUint(group, 10, 32)
	return ID{uint32(uid), uint32(gid)}, uidErr == nil && gidErr == nil
}

// In resolves user[:group] by the texts of an image's passwd and group files,
// in the way that Podman does when it starts a container.
func In(user, passwd, group string) (ID, error) {
	name, groupName, hasGroup := strings.Cut(user, ":")
	var id ID
	entry := entryOf(passwd, name, 2)
	switch uid, err := strconv.ParseUint(name, 10, 32); {
	case len(entry) > 3:
		uid, err1 := strconv.ParseUint(entry[2], 10, 32)
		gid, err2 := strconv.ParseUint(entry[3], 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			return id, fmt.Errorf("the image's /etc/passwd has a malformed entry for user %s", name)
		}
		id = ID{uint32(uid), uint32(gid)}
	case name == "" || name == "root":
	case err == nil:
		id.UID = uint32(uid)
	default:
		return id, fmt.Errorf("the image's /etc/passwd has no user %s", name)
	}
	if !hasGroup || groupName == "" {
		return id, nil
	}
	gidText := groupName
	if entry := entryOf(group, groupName, 2); len(entry) > 2 {
		gidText = entry[2]
	}
	gid, err := strconv.ParseUint(gidText, 10, 32)
	if err != nil {
		return id, fmt.Errorf("the image's /etc/group has no group %s", groupName)
	}
	id.GID = uint32(gid)
	return id, nil
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
