//go:build linux

package machine_test

import (
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

func TestWorkloadOutputAndExitCodeReachTheHost(t *testing.T) {
	t.Parallel()
	g := newSetup(t, nil, "spew", "20000").boot()
	greeting := g.hello()
	if greeting.GetPhase() != guestv1.Greeting_PHASE_WAITING {
		t.Errorf("greeting before Configure: %v", greeting)
	}
	g.configure(nil)
	g.endsWith(0)
	if got := strings.Count(g.stdout.String(), "\n") + strings.Count(g.stderr.String(), "\n"); got != 20000 {
		t.Errorf("%d lines arrived, want 20000", got)
	}
	if g.stdout.Len() == 0 || g.stderr.Len() == 0 {
		t.Errorf("%d and %d bytes on the two streams", g.stdout.Len(), g.stderr.Len())
	}
	if len(g.stages) == 0 {
		t.Error("no stage was told")
	}
}

func TestConfigureHasTheLastWordOnCommandAndEnvironment(t *testing.T) {
	t.Parallel()
	s := newSetup(t, nil, "exit", "9")
	s.plan.Workload.Env = map[string]string{"A": "image", "B": "image"}
	g := s.boot().configure(&guestv1.Configure{
		Command: []string{"/workload", "env", "A", "B", "HOME", "PATH", "HOSTNAME"}, Env: map[string]string{"B": "configured"}, Hostname: "box",
	})
	g.endsWith(0)
	want := "A=image\nB=configured\nHOME=/\nHOSTNAME=box\nPATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
	if diff := cmp.Diff(want, g.stdout.String()); diff != "" {
		t.Error(diff)
	}
}

func TestWorkloadAndExecsAreTheImagesUser(t *testing.T) {
	t.Parallel()
	s := newSetup(t, map[string]string{
		"etc/":       "",
		"etc/passwd": "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n",
		"etc/group":  "root:x:0:\napp:x:1001:\nextra:x:50:app\n",
	}, "sleep")
	s.plan.Workload.User = "app"
	s.plan.Workload.WorkingDir = "/srv/deep"
	g := s.boot().configure(&guestv1.Configure{
		Secrets: []*guestv1.Secret{{Name: "token", Value: []byte("hush"), File: true}},
	})
	g.prints("ready")
	if got := lines(g.run("id"), "uid=", "gid=", "CapEff="); got != "uid=1000\ngid=1001\nCapEff=0000000000000000" {
		t.Errorf("id: %s", got)
	}
	if got := lines(g.run("cat", "/proc/self/status"), "Groups:"); strings.Join(strings.Fields(got), " ") != "Groups: 50 1001" {
		t.Errorf("%q", got)
	}
	if got := g.run("env", "HOME"); got != "HOME=/home/app\n" {
		t.Errorf("%q", got)
	}
	// The working directory was absent, and is the user's.
	g.run("touch", "made-here")
	g.run("test-file", "/srv/deep/made-here")
	if got := g.run("cat", "/run/secrets/token"); got != "hush" {
		t.Errorf("secret: %q", got)
	}
	// Nor may the user look into guestd.
	if printed, code := g.exec(&guestv1.Exec{}, "cat", "/proc/1/environ"); code == 0 {
		t.Errorf("the user reads guestd's environment: %q", printed)
	}
	printed, code := g.exec(&guestv1.Exec{User: "root"}, "env", "HOME")
	if code != 0 || printed != "HOME=/root\n" {
		t.Errorf("as root: %q, %d", printed, code)
	}
	printed, _ = g.exec(&guestv1.Exec{User: "root"}, "id")
	if got := lines(printed, "uid="); got != "uid=0" {
		t.Errorf("as root: %s", printed)
	}
	g.order(int32(syscall.SIGTERM))
	g.endsWith(0)
}

func TestWhatIsWrittenOutlivesABoot(t *testing.T) {
	t.Parallel()
	s := newSetup(t, nil, "write", "/kept", "once")
	s.plan.Root.LayerSerial = layerSerial
	layer := s.disk(layerSerial, 600)
	for boot, want := range []string{"once\n", "once\nonce\n"} {
		g := s.boot().configure(nil)
		g.until("has written", func() bool { return g.stdout.Len() > 0 })
		if got := g.run("cat", "/kept"); got != want {
			t.Errorf("boot %d: %q, want %q", boot, got, want)
		}
		formatted := strings.Contains(strings.Join(g.stages, "\n"), "format")
		if formatted != (boot == 0) {
			t.Errorf("boot %d: stages %q", boot, g.stages)
		}
		if boot == 0 {
			size := lines(g.run("mounts"), "/ ")
			if !strings.Contains(size, "overlay") {
				t.Errorf("root: %q", size)
			}
		}
		g.order(int32(syscall.SIGTERM))
		g.endsWith(0)
		checkExt4(t, layer)
		s.disk(layerSerial, 700) // and it has grown when the next boot begins
	}
}

// checkExt4 sees that a file system was left as one that was unmounted, and is
// as large as its disk.
func checkExt4(t *testing.T, path string) {
	t.Helper()
	if checker, err := exec.LookPath("/usr/sbin/e2fsck"); err == nil {
		if said, err := exec.Command(checker, "-fn", path).CombinedOutput(); err != nil {
			t.Errorf("e2fsck: %v: %s", err, said)
		}
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	super := make([]byte, 1024)
	if _, err := file.ReadAt(super, 1024); err != nil {
		t.Fatal(err)
	}
	const recover = 0x4 // the journal has something in it; see fs/ext4/ext4.h
	if state, incompatible := super[58], super[96]; state != 1 || incompatible&recover != 0 {
		t.Errorf("state %#x, features %#x: not left in order", state, incompatible)
	}
	blocks := int64(super[4]) | int64(super[5])<<8 | int64(super[6])<<16 | int64(super[7])<<24
	if got, want := blocks*4096, info.Size(); got < want-(128<<20) || got > want {
		t.Errorf("the file system has %d bytes of %d", got, want)
	}
}

func TestDataDisksAreFormattedOnceAndNeverAgain(t *testing.T) {
	t.Parallel()
	s := newSetup(t, map[string]string{"srv/": "", "link": "-> /srv"}, "write", "/srv/data/kept", "once")
	s.plan.Workload.User = "1000:1000"
	s.plan.Disks = []*guestv1.DataDisk{{Serial: dataSerial, Target: "/link/data", Format: true}}
	data := s.disk(dataSerial, 64)
	for boot, want := range []string{"once\n", "once\nonce\n"} {
		g := s.boot().configure(nil)
		g.until("has written", func() bool { return g.stdout.Len() > 0 })
		if got := g.run("cat", "/srv/data/kept"); got != want {
			t.Errorf("boot %d: %q, want %q", boot, got, want)
		}
		if _, code := g.exec(&guestv1.Exec{}, "cat", "/srv/data/lost+found"); code == 0 || boot == 0 && !strings.Contains(lines(g.run("mounts"), "/srv/data"), "ext4") {
			t.Errorf("mounts: %s", g.run("mounts"))
		}
		g.order(int32(syscall.SIGTERM))
		g.endsWith(0)
		checkExt4(t, data)
	}
}

// refusal boots what cannot be made, and returns what guestd says of it.
func refusal(t *testing.T, s *setup) string {
	t.Helper()
	g := s.boot()
	ended := g.ends()
	if ended.GetCode() != 125 || ended.GetMessage() == "" || ended.GetOomKilled() {
		t.Errorf("ended with %v, want code 125 and a reason", ended)
	}
	return ended.GetMessage()
}

func TestDisksThatAreNotBlankAreLeftAsTheyAre(t *testing.T) {
	t.Parallel()
	s := newSetup(t, nil, "sleep")
	s.plan.Disks = []*guestv1.DataDisk{{Serial: dataSerial, Target: "/data", Format: true}}
	data := s.disk(dataSerial, 64)
	file, err := os.OpenFile(data, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := file.WriteAt([]byte("LABELONE"), 512); err != nil { // a volume of LVM's
		t.Fatal(err)
	}
	before := sum(t, file)
	if got := refusal(t, s); !strings.Contains(got, "data at /data") || !strings.Contains(got, "left as it is") {
		t.Errorf("message %q", got)
	}
	if after := sum(t, file); after != before {
		t.Error("it was written to")
	}
	file.Close()
}

func sum(t *testing.T, file *os.File) string {
	t.Helper()
	content, err := io.ReadAll(io.NewSectionReader(file, 0, 1<<30))
	if err != nil {
		t.Fatal(err)
	}
	return string(content[:4096]) + string(content[len(content)-4096:])
}

func TestMissingDiskIsNamed(t *testing.T) {
	t.Parallel()
	s := newSetup(t, nil, "sleep")
	s.plan.Root.LayerSerial = layerSerial
	if got := refusal(t, s); !strings.Contains(got, `"layer"`) || !strings.Contains(got, "no such disk") {
		t.Errorf("message %q", got)
	}
}

func TestDamagedImageIsSaidToBe(t *testing.T) {
	t.Parallel()
	s := newSetup(t, nil, "sleep")
	path := filepath.Join(s.dir, "damaged")
	write(t, path, strings.Repeat("nonsense", 1<<17))
	s.config.Disks[0].Path = path
	if got := refusal(t, s); !strings.Contains(got, `"image"`) || !strings.Contains(got, "damaged") {
		t.Errorf("message %q", got)
	}
}

func TestSharesAreMountedAsTheyAreMeant(t *testing.T) {
	t.Parallel()
	s := newSetup(t, map[string]string{"escape": "-> ../../../../srv"}, "sleep")
	work, data := s.share("work", "/escape/work", false), s.share("data", "/data", true)
	write(t, filepath.Join(data, "given"), "by the host")
	g := s.boot().configure(nil)
	g.prints("ready")
	if got := g.run("cat", "/data/given"); got != "by the host" {
		t.Errorf("%q", got)
	}
	g.run("touch", "/srv/work/made")
	if _, err := os.Stat(filepath.Join(work, "made")); err != nil {
		t.Error(err)
	}
	if printed, code := g.exec(&guestv1.Exec{}, "touch", "/data/made"); code == 0 {
		t.Errorf("a read-only share is written to: %s", printed)
	}
	g.order(int32(syscall.SIGTERM))
	g.endsWith(0)
}

func TestMissingShareIsNamed(t *testing.T) {
	t.Parallel()
	s := newSetup(t, nil, "sleep")
	s.plan.Shares = []*guestv1.Share{{Tag: "gone", Target: "/data"}}
	if got := refusal(t, s); !strings.Contains(got, "the share gone at /data: the machine has no such share") {
		t.Errorf("message %q", got)
	}
}

func TestSignalBeforeTheWorkloadEndsTheMachine(t *testing.T) {
	t.Parallel()
	g := newSetup(t, nil, "sleep").boot()
	g.order(int32(syscall.SIGTERM))
	g.endsWith(128 + int32(syscall.SIGTERM))
}

func TestWorkloadThatIsKilledSaysSo(t *testing.T) {
	t.Parallel()
	g := newSetup(t, nil, "ignore-term").boot().configure(nil)
	g.prints("ready")
	g.order(int32(syscall.SIGTERM))
	g.order(int32(syscall.SIGKILL))
	g.endsWith(128 + int32(syscall.SIGKILL))
}

func TestWantOfMemoryIsTold(t *testing.T) {
	t.Parallel()
	g := newSetup(t, nil, "memory", "4096").boot().configure(nil)
	if ended := g.ends(); ended.GetCode() != 137 || !ended.GetOomKilled() {
		t.Errorf("ended with %v", ended)
	}
}

func TestChildrenLeftBehindDoNotKeepTheMachine(t *testing.T) {
	t.Parallel()
	g := newSetup(t, nil, "orphan").boot().configure(nil)
	g.until("has printed", func() bool { return g.stdout.Len() > 0 })
	g.order(int32(syscall.SIGTERM))
	g.endsWith(0)
}

func TestMachineEndsWithItsShim(t *testing.T) {
	t.Parallel()
	g := newSetup(t, nil, "sleep").boot().configure(nil)
	g.prints("ready")
	g.shim.Close()
	g.off()
}

func TestUserThatTheImageDoesNotKnowIsNamed(t *testing.T) {
	t.Parallel()
	s := newSetup(t, nil, "sleep")
	s.plan.Workload.User = "nobody-here"
	if got := refusal(t, s); !strings.Contains(got, "nobody-here") {
		t.Errorf("message %q", got)
	}
}

func TestCommandThatIsNotThereEndsAsInAContainer(t *testing.T) {
	t.Parallel()
	s := newSetup(t, nil)
	s.plan.Workload.Command = []string{"/no/such/program"}
	g := s.boot()
	_, response := g.open(&guestv1.Request{Call: &guestv1.Request_Configure{Configure: &guestv1.Configure{Generation: 1}}})
	if response.GetFailure().GetCode() != guestv1.Failure_CODE_NOT_FOUND {
		t.Errorf("configure: %v", response)
	}
	if ended := g.ends(); ended.GetCode() != 127 || ended.GetMessage() == "" {
		t.Errorf("ended with %v", ended)
	}
}

// maxGuestd is how much memory guestd may have in a sandbox, in bytes.
const maxGuestd = 12 << 20

func TestGuestdIsSmall(t *testing.T) {
	t.Parallel()
	g := newSetup(t, nil, "sleep").boot().configure(nil)
	g.prints("ready")
	g.run("id")
	conn, response := g.open(&guestv1.Request{Call: &guestv1.Request_WatchStats{WatchStats: &guestv1.WatchStats{IntervalMillis: 1000}}})
	if f := response.GetFailure(); f != nil {
		t.Fatal(f)
	}
	var stats guestv1.Stats
	if err := conn.ReceiveMessage(&stats); err != nil {
		t.Fatal(err)
	}
	if got := stats.GetGuestdMemoryBytes(); got == 0 || got > maxGuestd {
		t.Errorf("guestd has %d bytes of memory, more than %d", got, maxGuestd)
	} else {
		t.Logf("guestd has %.1f MB of memory", float64(got)/1e6)
	}
	g.order(int32(syscall.SIGTERM))
	g.endsWith(0)
}

// TestMachineThatNobodyGivesAnAddressBootsAndGoesOnAsking is on a wire with
// nobody else.
func TestMachineThatNobodyGivesAnAddressBootsAndGoesOnAsking(t *testing.T) {
	t.Parallel()
	s := newSetup(t, nil, "sleep")
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	wire := os.NewFile(uintptr(ends[1]), "network")
	defer wire.Close()
	s.config.Network, s.config.MAC = os.NewFile(uintptr(ends[0]), "network"), net.HardwareAddr{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee}
	s.plan.Network = &guestv1.Network{Mac: s.config.MAC.String(), Dhcp: true}
	asked := make(chan struct{}, 64)
	go func() {
		defer close(asked)
		for frame := make([]byte, 2048); ; {
			size, err := wire.Read(frame)
			if err != nil {
				return
			}
			// IPv4 and UDP without options, to everybody's port 67.
			if size > 42 && frame[12] == 8 && frame[13] == 0 && frame[23] == unix.IPPROTO_UDP && frame[36] == 0 && frame[37] == 67 {
				select {
				case asked <- struct{}{}:
				default:
				}
			}
		}
	}()
	g := s.boot().configure(nil)
	g.prints("ready")
	before := len(asked)
	if before == 0 {
		t.Error("it did not ask")
	}
	if routes := g.run("cat", "/proc/net/route"); strings.Contains(routes, "eth0") {
		t.Errorf("routes: %s", routes)
	}
	for range before + 1 { // those of the boot, and one more
		select {
		case _, open := <-asked:
			if !open {
				t.Fatal("the wire is broken")
			}
		case <-time.After(time.Minute):
			t.Fatal("it does not ask any more")
		}
	}
	g.order(int32(syscall.SIGTERM))
	g.endsWith(0)
}

func TestNetworkIsSetUp(t *testing.T) {
	t.Parallel()
	s := newSetup(t, map[string]string{"etc/": "", "etc/resolv.conf": "-> ../run/systemd/resolve/stub-resolv.conf"}, "sleep")
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours := os.NewFile(uintptr(ends[1]), "network")
	defer ours.Close()
	s.config.Network = os.NewFile(uintptr(ends[0]), "network")
	s.config.MAC = net.HardwareAddr{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee}
	s.plan.Network = &guestv1.Network{
		Mac: s.config.MAC.String(), Address: "192.168.127.2/24", Gateway: "192.168.127.1", Nameservers: []string{"192.168.127.1"}, Mtu: 1400,
	}
	g := s.boot().configure(&guestv1.Configure{Hostname: "box"})
	g.prints("ready")
	for file, want := range map[string]string{
		"/etc/resolv.conf":        "nameserver 192.168.127.1\n",
		"/etc/hosts":              "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n192.168.127.2\tbox\n",
		"/etc/hostname":           "box\n",
		"/sys/class/net/eth0/mtu": "1400\n",
	} {
		if got := g.run("cat", file); got != want {
			t.Errorf("%s: %q, want %q", file, got, want)
		}
	}
	// Destination, gateway and mask, each backwards: the net, and the rest.
	routes := g.run("cat", "/proc/net/route")
	for _, want := range []string{"eth0\t00000000\t017FA8C0", "eth0\t007FA8C0\t00000000"} {
		if !strings.Contains(routes, want) {
			t.Errorf("routes: %s", routes)
		}
	}
	g.order(int32(syscall.SIGTERM))
	g.endsWith(0)
}
