//go:build linux

package guestd

import (
	"bufio"
	"errors"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

// The files of users and groups; see passwd(5) and group(5).
const (
	passwdFile = "/etc/passwd"
	groupFile  = "/etc/group"
	// maxUsers is how much of each is read, in bytes.
	maxUsers = 1 << 20
)

// account is who a command runs as.
type account struct {
	uid, gid uint32
	groups   []uint32
	home     string
}

func (a *account) credential() *syscall.Credential {
	return &syscall.Credential{Uid: a.uid, Gid: a.gid, Groups: a.groups}
}

// find resolves a user as the sandbox's own tables have it; empty: root.
func find(user string) (account, error) {
	if user == "" {
		user = "0"
	}
	return resolve(user, readTable(passwdFile), readTable(groupFile))
}

// become is the function of that name where guestd is the workload's user. In a
// machine, where it is not, a command is the workload's user's unless it is said
// to be another's.
func (w *workload) become(user string) (*syscall.Credential, string, error) {
	switch {
	case w.account == nil:
		return become(user)
	case user == "":
		return w.account.credential(), "", nil
	}
	who, err := find(user)
	return who.credential(), who.home, err
}

// become returns what makes a process be user[:group], and that one's home; nil
// if guestd is that user already.
func become(user string) (*syscall.Credential, string, error) {
	if user == "" {
		return nil, "", nil
	}
	who, err := find(user)
	if err != nil {
		return nil, "", err
	}
	if int(who.uid) == os.Getuid() && int(who.gid) == os.Getgid() {
		return nil, "", nil
	}
	if !mayChangeUser() {
		return nil, "", failuref(guestv1.Failure_CODE_DENIED,
			"user %s: guestd runs as user %d and may not become another; add cap_add: [SETUID, SETGID] to the sandbox's driver options",
			user, os.Getuid())
	}
	return who.credential(), who.home, nil
}

// mayChangeUser reports whether guestd has the capabilities for that; see
// capabilities(7).
func mayChangeUser() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&header, &data[0]) != nil {
		return false
	}
	const needed = 1<<unix.CAP_SETUID | 1<<unix.CAP_SETGID
	return data[0].Effective&needed == needed
}

// resolve finds user[:group], each a name or a number, in the two tables. A
// number need not be in one.
func resolve(user string, users, groups [][]string) (account, error) {
	name, group, hasGroup := strings.Cut(user, ":")
	who, login, err := resolveUser(name, users)
	if err != nil {
		return account{}, err
	}
	if hasGroup {
		who.gid, err = resolveGroup(group, groups)
		if err != nil {
			return account{}, err
		}
		who.groups = []uint32{who.gid}
		return who, nil
	}
	who.groups = []uint32{who.gid}
	for _, entry := range groups {
		if len(entry) < 4 || login == "" || !slices.Contains(strings.Split(entry[3], ","), login) {
			continue
		}
		if gid, ok := number(entry[2]); ok && !slices.Contains(who.groups, gid) && len(who.groups) < maxGroups {
			who.groups = append(who.groups, gid)
		}
	}
	return who, nil
}

// maxGroups is how many a process can be in; see NGROUPS_MAX in getgroups(2).
const maxGroups = 65536

func resolveUser(name string, users [][]string) (account, string, error) {
	uid, isNumber := number(name)
	for _, entry := range users {
		if len(entry) < 7 {
			continue
		}
		id, ok := number(entry[2])
		gid, ok2 := number(entry[3])
		if ok && ok2 && (entry[0] == name || isNumber && id == uid) {
			return account{uid: id, gid: gid, home: entry[5]}, entry[0], nil
		}
	}
	if !isNumber {
		return account{}, "", failuref(guestv1.Failure_CODE_NOT_FOUND, "user %.64q: not in %s", name, passwdFile)
	}
	return account{uid: uid, home: "/"}, "", nil
}

func resolveGroup(name string, groups [][]string) (uint32, error) {
	if gid, ok := number(name); ok {
		return gid, nil
	}
	for _, entry := range groups {
		if len(entry) < 3 || entry[0] != name {
			continue
		}
		if gid, ok := number(entry[2]); ok {
			return gid, nil
		}
	}
	return 0, failuref(guestv1.Failure_CODE_NOT_FOUND, "group %.64q: not in %s", name, groupFile)
}

// number reads an id. The last is no id but "unchanged" to setuid(2).
func number(text string) (uint32, bool) {
	n, err := strconv.ParseUint(text, 10, 32)
	return uint32(n), err == nil && n < 1<<32-1
}

// readTable reads lines of fields between colons. A file that is not there, or
// is none, is empty.
func readTable(path string) [][]string {
	// Not waiting, for the sandbox may have put a pipe there.
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer file.Close()
	if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil
	}
	table, _ := parseTable(io.LimitReader(file, maxUsers))
	return table
}

func parseTable(r io.Reader) ([][]string, error) {
	var table [][]string
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if line := strings.TrimSpace(lines.Text()); line != "" && line[0] != '#' {
			table = append(table, strings.Split(line, ":"))
		}
	}
	if err := lines.Err(); err != nil && !errors.Is(err, bufio.ErrTooLong) {
		return table, err
	}
	return table, nil
}
