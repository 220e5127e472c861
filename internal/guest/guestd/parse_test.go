//go:build linux

package guestd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

const (
	testPasswd = "# comment\nroot:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34:Web:/srv/www:/bin/false\n44:x:45:46::/odd:\n:::\n"
	testGroup  = "root:x:0:\nweb:x:34:\nlogs:x:4:syslog,web\nmore:x:5:web\nbad:x:-1:web\n"
)

func TestUsersAreResolved(t *testing.T) {
	t.Parallel()
	for user, want := range map[string]account{
		"root":       {0, 0, []uint32{0}, "/root"},
		"web":        {33, 34, []uint32{34, 4, 5}, "/srv/www"},
		"33":         {33, 34, []uint32{34, 4, 5}, "/srv/www"},
		"web:logs":   {33, 4, []uint32{4}, "/srv/www"},
		"web:99":     {33, 99, []uint32{99}, "/srv/www"},
		"1234":       {1234, 0, []uint32{0}, "/"},
		"1234:web":   {1234, 34, []uint32{34}, "/"},
		"44":         {45, 46, []uint32{46}, "/odd"},
		"4294967294": {1<<32 - 2, 0, []uint32{0}, "/"},
	} {
		got, err := resolve(user, table(testPasswd), table(testGroup))
		if err != nil {
			t.Errorf("%s: %v", user, err)
			continue
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(account{})); diff != "" {
			t.Errorf("%s: %s", user, diff)
		}
	}
	for _, user := range []string{"", "nobody", ":", "web:", "web:nobody", "-1", "4294967295", "web:4294967295", "root\n"} {
		if got, err := resolve(user, table(testPasswd), table(testGroup)); err == nil {
			t.Errorf("%q is %+v", user, got)
		}
	}
}

func table(text string) [][]string {
	table, _ := parseTable(strings.NewReader(text))
	return table
}

func FuzzUsers(f *testing.F) {
	f.Add("web", testPasswd, testGroup)
	f.Add("0:0", "", "")
	f.Add("a:b", "a:::::::\n", "b:::\n")
	f.Fuzz(func(t *testing.T, user, passwd, group string) {
		who, err := resolve(user, table(passwd), table(group))
		if err == nil && (len(who.groups) == 0 || len(who.groups) > maxGroups || who.uid == 1<<32-1 || who.gid == 1<<32-1) {
			t.Fatalf("%+v", who)
		}
	})
}

func FuzzStat(f *testing.F) {
	f.Add("12 (sh) S 3 4 5 0 -1", 12)
	f.Add("12 (a) b) R) Z 3 4 5", 12)
	f.Add("", 0)
	f.Add(")", 1)
	f.Fuzz(func(t *testing.T, text string, pid int) {
		if p, ok := parseStat(pid, text); ok && p.pid != pid {
			t.Fatalf("%+v", p)
		}
	})
	if p, ok := parseStat(12, "12 (a) b) R) Z 3 4 5 0"); !ok || p != (process{12, 3, 5, true}) {
		f.Errorf("%+v, %v", p, ok)
	}
}

func TestBacklogKeepsTheLast(t *testing.T) {
	t.Parallel()
	var b backlog
	for i := range 100000 {
		kind := wire.KindData
		if i%7 == 0 {
			kind = wire.KindStderr
		}
		b.add(kind, fmt.Appendf(nil, "%d\n", i))
		if b.size > maxBacklog || len(b.pieces) > maxPieces {
			t.Fatalf("%d bytes in %d pieces", b.size, len(b.pieces))
		}
	}
	var all []byte
	for _, piece := range b.take() {
		all = append(all, piece.data...)
	}
	lines := strings.Split(strings.TrimSpace(string(all)), "\n")
	for i, line := range slices.Backward(lines) {
		if n := 100000 - len(lines) + i; i > 0 && line != itoa(n) {
			t.Fatalf("line %d is %q, not %d", i, line, n)
		}
	}
	if len(lines) < 3000 || len(b.take()) != 0 {
		t.Errorf("%d lines", len(lines))
	}
	b.add(wire.KindData, make([]byte, 3*maxBacklog))
	if b.size != maxBacklog {
		t.Errorf("%d bytes", b.size)
	}
	b.add(wire.KindStderr, []byte("x"))
	if pieces := b.take(); len(pieces) != 2 || len(pieces[0].data) != maxBacklog-1 {
		t.Errorf("%d pieces", len(pieces))
	}
}

func TestMergeSetsTheLast(t *testing.T) {
	t.Parallel()
	base := []string{"A=1", "B=2", "A=3", "EMPTY="}
	got := merge(base, []string{"B=x=y", "C="})
	if diff := cmp.Diff([]string{"A=3", "B=x=y", "EMPTY=", "C="}, got); diff != "" {
		t.Error(diff)
	}
	if base[1] != "B=2" {
		t.Error("changed in place")
	}
}

func TestErrorsHaveCodes(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]guestv1.Failure_Code{
		fs.ErrNotExist:               guestv1.Failure_CODE_NOT_FOUND,
		os.ErrExist:                  guestv1.Failure_CODE_EXISTS,
		syscall.EACCES:               guestv1.Failure_CODE_DENIED,
		syscall.EPERM:                guestv1.Failure_CODE_DENIED,
		syscall.ENOSPC:               guestv1.Failure_CODE_EXHAUSTED,
		syscall.EMFILE:               guestv1.Failure_CODE_EXHAUSTED,
		syscall.EAGAIN:               guestv1.Failure_CODE_EXHAUSTED,
		syscall.ECONNREFUSED:         guestv1.Failure_CODE_REFUSED,
		errors.New("other"):          guestv1.Failure_CODE_UNSPECIFIED,
		wire.ErrProtocol:             guestv1.Failure_CODE_INVALID,
		failuref(5, "state"):         guestv1.Failure_CODE_STATE,
		&endError{1, os.ErrNotExist}: guestv1.Failure_CODE_NOT_FOUND,
	} {
		if got := failure(fmt.Errorf("op: %w", err)); got.GetCode() != want || !strings.HasPrefix(got.GetMessage(), "op: ") {
			t.Errorf("%v: %v, want %v", err, got, want)
		}
	}
	if f := failure(errors.New(strings.Repeat("é", maxMessage) + "\xff")); len(f.GetMessage()) > maxMessage {
		t.Errorf("%d bytes", len(f.GetMessage()))
	}
}

func TestCommandLine(t *testing.T) {
	t.Parallel()
	o, err := parse([]string{"--listen", "vsock:1024", "--", "sh", "-c", "--listen"}, true, nil)
	if err != nil || o.listen != "vsock:1024" || o.trust != trustOutside || !slices.Equal(o.command, []string{"sh", "-c", "--listen"}) {
		t.Errorf("%+v, %v", o, err)
	}
	for _, args := range [][]string{{"--trust", "all"}, {"--no-such"}} {
		if _, err := parse(args, false, nil); err == nil {
			t.Errorf("%v is taken", args)
		}
	}
	for _, address := range []string{"", "tcp:80", "vsock:x", "unix:/no/such/folder/s"} {
		if _, err := listen(address, trustAnyone); err == nil {
			t.Errorf("%s is listened at", address)
		}
	}
}
