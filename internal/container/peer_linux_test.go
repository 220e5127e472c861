package container

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/sandbox"
)

func TestIsFirst(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		own, peer []int
		first     bool
	}{
		"first of a container":      {[]int{500}, []int{1000, 1}, true},
		"agent in a container":      {[]int{500, 7}, []int{1000, 30, 1}, true},
		"another of a container":    {[]int{500}, []int{1001, 2}, false},
		"first of a nested one":     {[]int{500}, []int{1001, 2, 1}, false},
		"on the host":               {[]int{500}, []int{1}, false},
		"beside the agent":          {[]int{500, 7}, []int{600, 1}, false},
		"gone":                      {[]int{500}, []int{-1}, false},
		"not to be seen from here":  {[]int{500}, nil, false},
		"without numbers of itself": {nil, []int{1}, false},
	} {
		if got := isFirst(test.own, test.peer); got != test.first {
			t.Errorf("%s: %t, want %t", name, got, test.first)
		}
	}
}

func TestParseNumbers(t *testing.T) {
	t.Parallel()
	got, err := parseNumbers(strings.NewReader("Name:\tNSpid: 3\nPid:\t7\nNSpid:\t7\t1\nrest\n"))
	if diff := cmp.Diff([]int{7, 1}, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	for _, text := range []string{"", "Pid: 1\n", "NSpid:\tx\n"} {
		if got, err := parseNumbers(strings.NewReader(text)); err == nil {
			t.Errorf("%q is %v", text, got)
		}
	}
	if own, err := numbersIn("/proc/self/status"); err != nil || len(own) == 0 || own[len(own)-1] != os.Getpid() {
		t.Errorf("this process is %v, %v", own, err)
	}
}

// TestDialOfGuestdWantsTheFirstProcess has somebody on the host listen where
// guestd should.
func TestDialOfGuestdWantsTheFirstProcess(t *testing.T) {
	t.Parallel()
	ref := sandbox.Ref{ID: "a", Dir: shortDir(t)}
	if err := makeDir(ref); err != nil {
		t.Fatal(err)
	}
	guestListener(t, filepath.Join(guestDir(ref), "1024.sock"))
	conn, err := dialDriver(t).Dial(t.Context(), ref, wire.Port)
	if err == nil {
		conn.Close()
	}
	if !errors.Is(err, sandbox.ErrGuest) {
		t.Errorf("Dial: %v, want an error about the guest", err)
	}
}
