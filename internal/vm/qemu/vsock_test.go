//go:build linux

package qemu

import (
	"strings"
	"testing"
	"time"

	"github.com/choiros/agent/internal/vm/qemu/vhost"
)

// TestBrokenVsockEndsMachine has the device's front end send nonsense, as a
// guest's driver would that does not keep to the protocol.
func TestBrokenVsockEndsMachine(t *testing.T) {
	t.Parallel()
	m := &machine{children: newChildren(t.TempDir()), vsock: vhost.New(userCID)}
	t.Cleanup(m.vsock.Close)
	t.Cleanup(m.children.kill)
	qemu, err := m.children.start("qemu", "/bin/sleep", []string{"1h"}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := m.serveVsock()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	if _, err := theirs.WriteString("this is no message"); err != nil {
		t.Fatal(err)
	}
	select {
	case first := <-m.children.fall:
		if err := m.verdict(qemu, first); err == nil || !strings.HasPrefix(err.Error(), "vsock: the front end has sent nonsense") {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Error("it runs on")
	}
}
