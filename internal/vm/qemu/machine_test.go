//go:build linux

package qemu_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/qemu"
)

func TestGuestSwitchesItselfOff(t *testing.T) {
	t.Parallel()
	g := boot(t, nil)
	g.ask(t, "poweroff")
	if err := g.ends(t); err != nil {
		t.Error(err)
	}
	if err := g.Kill(); err != nil {
		t.Error("kill of what has ended:", err)
	}
	if _, err := g.Dial(t.Context(), 1024); !errors.Is(err, vm.ErrNoListener) {
		t.Error("dial of what has ended:", err)
	}
	if err := g.Pause(t.Context()); err == nil {
		t.Error("what has ended was paused")
	}
}

func TestResetEndsMachineWithError(t *testing.T) {
	t.Parallel()
	g := boot(t, nil)
	g.ask(t, "reboot")
	if err := g.ends(t); err == nil || !strings.Contains(err.Error(), "guest-reset") {
		t.Error(err)
	}
}

func TestConnections(t *testing.T) {
	t.Parallel()
	g := newGuest(t, nil)
	calls, err := g.Listen(1025)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.Dial(t.Context(), 1024); !errors.Is(err, vm.ErrNoListener) {
		t.Error("dial before the start:", err)
	}
	if err := g.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := g.Start(t.Context()); err == nil {
		t.Error("it was started twice")
	}
	if _, err := g.Listen(1026); err == nil {
		t.Error("listens after the start")
	}
	g.console.awaits(t, "init: ready")

	t.Run("NobodyListens", func(t *testing.T) {
		if conn, err := g.Dial(t.Context(), 4000); !errors.Is(err, vm.ErrNoListener) {
			t.Error(conn, err)
		}
	})
	t.Run("CancelledDial", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := g.Dial(ctx, 1024); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Run("GuestDials", func(t *testing.T) {
		g.ask(t, "dial 1025")
		conn, err := calls.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(bootLimit))
		if _, err := io.WriteString(conn, "and back"); err != nil {
			t.Fatal(err)
		}
		if err := closeWrite(conn); err != nil {
			t.Fatal(err)
		}
		said, err := io.ReadAll(conn)
		if got := string(said); got != "hello from inside\nand back" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("OneWay", func(t *testing.T) { transfer(t, g, "give", 32<<20, 0) })
	t.Run("OtherWay", func(t *testing.T) { transfer(t, g, "drain", 0, 32<<20) })
	t.Run("BothWays", func(t *testing.T) { transfer(t, g, "both", 32<<20, 32<<20) })
	t.Run("Many", func(t *testing.T) {
		for range 16 {
			t.Run("", func(t *testing.T) {
				t.Parallel()
				transfer(t, g, "both", 1<<20, 1<<20)
			})
		}
	})
	t.Run("ShortCalls", func(t *testing.T) {
		const calls = 200
		start, worst := time.Now(), time.Duration(0)
		for range calls {
			before := time.Now()
			if got := g.ask(t, "keep this"); got != "ok" {
				t.Fatal(got)
			}
			worst = max(worst, time.Since(before))
		}
		t.Logf("%d calls, each with a connection of its own: %v each, %v at worst", calls, time.Since(start)/calls, worst)
	})
	t.Run("Echo", func(t *testing.T) {
		conn, err := g.Dial(t.Context(), 1024)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(bootLimit))
		if _, err := io.WriteString(conn, "echo\n"); err != nil {
			t.Fatal(err)
		}
		const rounds = 500
		start, worst := time.Now(), time.Duration(0)
		for range rounds {
			before := time.Now()
			if _, err := conn.Write([]byte{1}); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			worst = max(worst, time.Since(before))
		}
		t.Logf("round trip %v, %v at worst", time.Since(start)/rounds, worst)
	})
	t.Run("Console", func(t *testing.T) {
		if _, err := io.WriteString(g.console.keys, "typed\n"); err != nil {
			t.Error(err)
		}
		g.console.awaits(t, "typed") // the guest's terminal echoes
	})

	if err := g.Kill(); err != nil {
		t.Error(err)
	}
	if err := g.ends(t); err != nil {
		t.Error("killed:", err)
	}
	if _, err := calls.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Error("the listener outlives the machine:", err)
	}
}

// transfer has the guest send and take in that much at once.
func transfer(t *testing.T, g *guest, command string, out, in int64) {
	t.Helper()
	conn, err := g.Dial(t.Context(), 1024)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(bootLimit))
	start := time.Now()
	sent := make(chan error, 1)
	go func() {
		_, err := io.WriteString(conn, strings.TrimSpace(command+" "+map[bool]string{true: itoa(out)}[out > 0])+"\n")
		if err == nil {
			_, err = io.CopyN(conn, zeros{}, in)
		}
		if err == nil {
			err = closeWrite(conn)
		}
		sent <- err
	}()
	n, err := io.Copy(io.Discard, io.LimitReader(conn, out))
	if n != out || err != nil {
		t.Errorf("%d of %d bytes arrived: %v", n, out, err)
	}
	if err := <-sent; err != nil {
		t.Error("send:", err)
	}
	rest, err := io.ReadAll(conn)
	if want := itoa(in); err != nil || command != "give" && strings.TrimSpace(string(rest)) != want {
		t.Errorf("the guest says that %q bytes arrived, not %s: %v", rest, want, err)
	}
	took := time.Since(start)
	t.Logf("%s: %d bytes out, %d in, in %v: %.0f MB/s", command, out, in, took, float64(out+in)/1e6/took.Seconds())
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestPauseAndResume(t *testing.T) {
	t.Parallel()
	g := boot(t, nil)
	for range 2 { // the second time nothing is left to do
		if err := g.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if conn, err := g.Dial(ctx, 1024); err == nil {
		// The kernel's device may take the connection on, but the guest does not.
		conn.SetDeadline(time.Now().Add(300 * time.Millisecond))
		io.WriteString(conn, "clock\n")
		if n, err := conn.Read(make([]byte, 1)); err == nil {
			t.Errorf("a paused guest answered with %d bytes", n)
		}
		conn.Close()
	}
	for range 2 {
		if err := g.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := g.ask(t, "keep this"); got != "ok" {
		t.Error(got)
	}
	// While bytes flow both ways, a pause may meet any moment of that.
	done := make(chan struct{})
	go func() {
		defer close(done)
		transfer(t, g, "both", 8<<20, 8<<20)
	}()
	pauses := 0
	for over := false; !over; pauses++ {
		if err := errors.Join(g.Pause(t.Context()), g.Resume(t.Context())); err != nil {
			t.Fatal(err)
		}
		select {
		case <-done:
			over = true
		case <-time.After(time.Millisecond):
		}
	}
	t.Logf("%d pauses", pauses)
	if got := g.ask(t, "kept"); got != "this" {
		t.Error(got)
	}
}

func TestDisks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writable, readOnly := filepath.Join(dir, "writable,with=comma"), filepath.Join(dir, "read-only")
	for _, name := range []string{writable, readOnly} {
		if err := os.WriteFile(name, []byte("content of "+filepath.Base(name)), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(name, 64<<20); err != nil {
			t.Fatal(err)
		}
	}
	change := func(c *vm.Config, _ *qemu.Options) {
		c.Disks = []vm.Disk{{Serial: "ro", Path: readOnly, ReadOnly: true}, {Serial: "rw", Path: writable}}
	}
	g := boot(t, change)
	if got := g.ask(t, "read /sys/block/vda/serial") + g.ask(t, "read /sys/block/vdb/serial"); got != "rorw" {
		t.Error("serials", got)
	}
	if got := g.ask(t, "read /dev/vda"); got != "content of read-only" {
		t.Error(got)
	}
	if got := g.ask(t, "write /dev/vda changed"); !strings.HasPrefix(got, "error") {
		t.Error("a disk that is only read was written:", got)
	}

	other := newGuest(t, change)
	err := other.Start(t.Context())
	if err == nil || !strings.Contains(err.Error(), `write" lock`) {
		t.Error("two machines write to a disk:", err)
	}
	if err := other.ends(t); err == nil {
		t.Error("a machine that did not start ended well")
	}

	if got := g.ask(t, "write /dev/vdb changed"); got != "ok" {
		t.Error(got)
	}
	content, err := os.ReadFile(writable)
	if err != nil || !strings.HasPrefix(string(content), "changed") {
		t.Errorf("what was synced inside is not in the file: %q, %v", content[:16], err)
	}
	if got := g.ask(t, "zero /dev/vdb"); got != "ok" {
		t.Error(got)
	}
	info, err := os.Stat(writable)
	if err != nil {
		t.Fatal(err)
	}
	if blocks := info.Sys().(*syscall.Stat_t).Blocks; blocks != 0 {
		t.Errorf("%d blocks are left of what was discarded", blocks)
	}
}

func TestNetworkCarriesFrames(t *testing.T) {
	t.Parallel()
	ours, theirs, err := datagrams()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	mac := net.HardwareAddr{0x52, 0x54, 0, 1, 2, 3}
	g := boot(t, func(c *vm.Config, _ *qemu.Options) { c.Network, c.MAC = theirs, mac })
	if got := g.ask(t, "read /sys/class/net/eth0/address"); got != mac.String() {
		t.Error(got)
	}
	if got := g.ask(t, "up eth0"); got != "ok" {
		t.Fatal(got)
	}
	// Once it is up the kernel looks for IPv6 routers by itself.
	frame := make([]byte, 2048)
	ours.SetDeadline(time.Now().Add(bootLimit))
	n, err := ours.Read(frame)
	if err != nil || n < 14 || net.HardwareAddr(frame[6:12]).String() != mac.String() {
		t.Fatalf("%d bytes, %x, %v", n, frame[:n], err)
	}
	// ARP is not asked for, but counted.
	if _, err := ours.Write(append(append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, 2, 0, 0, 0, 0, 1, 8, 6), make([]byte, 46)...)); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(bootLimit)
	for g.ask(t, "read /sys/class/net/eth0/statistics/rx_packets") == "0" {
		if time.Now().After(deadline) {
			t.Fatal("the frame did not arrive")
		}
	}
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

// datagrams is a pair of sockets such as a machine's network is.
func datagrams() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "network"), os.NewFile(uintptr(fds[1]), "network"), nil
}
