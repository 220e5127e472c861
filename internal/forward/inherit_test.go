package forward

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// child reports whether this process was started by runChild for that.
func child(name string) bool { return os.Getenv("FORWARD_TEST_CHILD") == name }

// runChild runs the calling test in a process of its own.
func runChild(t *testing.T, name string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.count=1")
	cmd.Env = append(os.Environ(), "FORWARD_TEST_CHILD="+name)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// manager receives what a service manager is sent, and keeps descriptors as
// systemd does.
type manager struct {
	path   string
	socket *net.UnixConn

	mu    sync.Mutex
	store map[string][]int
	deaf  bool // leaves barriers open
	done  chan struct{}
}

func startManager(t *testing.T, abstract bool) *manager {
	t.Helper()
	dir, err := os.MkdirTemp("", "sd")
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{path: filepath.Join(dir, "notify"), store: map[string][]int{}, done: make(chan struct{})}
	if abstract {
		m.path = "@choiros-forward-test-" + filepath.Base(dir)
	}
	if m.socket, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.path, Net: "unixgram"}); err != nil {
		t.Fatal(err)
	}
	go m.run(t)
	t.Cleanup(func() {
		m.socket.Close()
		<-m.done
		for _, fds := range m.store {
			for _, fd := range fds {
				unix.Close(fd)
			}
		}
		os.RemoveAll(dir)
	})
	return m
}

func (m *manager) run(t *testing.T) {
	defer close(m.done)
	message, rights := make([]byte, 4096), make([]byte, 4096)
	for {
		n, oob, _, _, err := m.socket.ReadMsgUnix(message, rights)
		if err != nil {
			return
		}
		var fds []int
		controls, _ := unix.ParseSocketControlMessage(rights[:oob])
		for _, control := range controls {
			more, _ := unix.ParseUnixRights(&control)
			fds = append(fds, more...)
		}
		lines := strings.Split(string(message[:n]), "\n")
		name := ""
		for _, line := range lines {
			if value, ok := strings.CutPrefix(line, "FDNAME="); ok {
				name = value
			}
		}
		m.mu.Lock()
		switch {
		case slices.Contains(lines, "FDSTORE=1"):
			m.store[name] = append(m.store[name], fds...)
			fds = nil
		case slices.Contains(lines, "FDSTOREREMOVE=1"):
			fds = append(fds, m.store[name]...)
			delete(m.store, name)
		case slices.Contains(lines, "BARRIER=1"):
			if m.deaf {
				fds = nil
			}
		default:
			t.Errorf("unknown message %q", message[:n])
		}
		m.mu.Unlock()
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
}

func (m *manager) names() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	for name, fds := range m.store {
		names = append(names, fmt.Sprint(name, " ", len(fds)))
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// files are copies of what is stored, as the next start gets them.
func (m *manager) files(t *testing.T) []*os.File {
	m.mu.Lock()
	defer m.mu.Unlock()
	var files []*os.File
	for name, fds := range m.store {
		for _, fd := range fds[:1] { // the same again is not stored by systemd
			duplicate, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, os.NewFile(uintptr(duplicate), name))
		}
	}
	return files
}

func TestClientsSeeNoRefusalAcrossARestart(t *testing.T) {
	t.Parallel()
	for _, abstract := range []bool{false, true} {
		t.Run(fmt.Sprintf("abstract=%v", abstract), func(t *testing.T) {
			t.Parallel()
			m := startManager(t, abstract)
			first, last := ranges()
			addr, udpAddr := server(t, "tcp", echo), udpServer(t, "echo")
			tcpGuests, udpGuests := leadTo(addr), leadTo(udpAddr)
			config := Config{First: first, Last: last, Keeper: FDStore{Socket: m.path}, Backend: tcpGuests}
			f := New(config)
			l := forwarded(t, f, Lease{})
			kept := fmt.Sprintf("forward-tcp-127.0.0.1-%d 1", l.HostPort)
			eventually(t, "it is kept", func() bool { return m.names() == kept })
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}

			conn := dial(t, l) // between two agents
			_, _ = conn.Write([]byte("anybody there?"))

			config.Inherited = m.files(t)
			f = New(config)
			if err := f.Open(l); err != nil {
				t.Fatal(err)
			}
			f.DropUnclaimed()
			if _, err := io.ReadFull(conn, make([]byte, 14)); err != nil {
				t.Errorf("the client that came between: %v", err)
			}
			conn.Close()
			f.Release(l)
			if names := m.names(); names != "" {
				t.Errorf("kept after release: %s", names)
			}
			if _, err := net.Dial("tcp", l.dialAddress()); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("dialled after release: %v", err)
			}
			_ = f.Close()

			config.Backend, config.Inherited = udpGuests, nil
			f = New(config)
			u := forwarded(t, f, Lease{UDP: true})
			eventually(t, "it is kept", func() bool { return m.names() != "" })
			_ = f.Close()
			client := dialUDP(t, u)
			_, _ = client.Write([]byte("anybody there?"))
			config.Inherited = m.files(t)
			f = New(config)
			if err := f.Open(u); err != nil {
				t.Fatal(err)
			}
			_ = client.SetReadDeadline(time.Now().Add(20 * time.Second))
			if n, err := client.Read(make([]byte, 100)); n != 14 || err != nil {
				t.Errorf("the datagram that came between: %d bytes, %v", n, err)
			}
			f.Release(u)
			// The number is free at once, for the manager has closed its copy.
			socket, err := net.ListenPacket("udp", u.dialAddress())
			if err != nil {
				t.Fatalf("bound after release: %v", err)
			}
			socket.Close()
			_ = f.Close()
		})
	}
}

func TestWhatNoLeaseClaimsIsDroppedAndNotReserved(t *testing.T) {
	t.Parallel()
	m := startManager(t, false)
	first, _ := ranges()
	config := Config{First: first, Last: first, Keeper: FDStore{Socket: m.path}, Backend: leadTo("127.0.0.1:1")}
	f := New(config)
	l := forwarded(t, f, Lease{Sandbox: "gone"})
	eventually(t, "it is kept", func() bool { return m.names() != "" })
	_ = f.Close()
	config.Inherited = m.files(t)
	f = open(t, config)
	if got, err := f.Reserve([]Lease{{Sandbox: "new", GuestPort: 1}}, field); err == nil {
		t.Errorf("reserved while it may be claimed: %+v", got)
	}
	waits, err := net.Dial("tcp", l.dialAddress())
	if err != nil {
		t.Fatal(err)
	}
	defer waits.Close()
	f.DropUnclaimed()
	if names := m.names(); names != "" {
		t.Errorf("still kept: %s", names)
	}
	_ = waits.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := waits.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("who waited for the past owner saw %v", err)
	}
	if _, err := f.Reserve([]Lease{{Sandbox: "new", GuestPort: 1}}, field); err != nil {
		t.Errorf("reserved afterwards: %v", err)
	}
}

func TestOnlyAListenerOfTheLeaseIsInherited(t *testing.T) {
	t.Parallel()
	m := startManager(t, false)
	first, last := ranges()
	l := Lease{Sandbox: "web", GuestPort: 80, HostPort: first}
	name := l.keepName()
	listener, err := net.Listen("tcp", "127.0.0.1:0") // another port under its name
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	other, err := listener.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	client, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	connected, err := client.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	as := func(file *os.File, name string) *os.File {
		defer file.Close()
		fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), name)
	}
	api := as(reader, "api.socket")
	defer api.Close()
	f := open(t, Config{
		First: first, Last: last, Keeper: FDStore{Socket: m.path}, Backend: leadTo(server(t, "tcp", echo)),
		Inherited: []*os.File{as(other, name), as(connected, name), api},
	})
	if err := f.Open(l); err != nil {
		t.Fatal(err)
	}
	f.DropUnclaimed()
	conn := dial(t, l)
	_, _ = conn.Write([]byte("x"))
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Errorf("through the lease: %v", err)
	}
	if _, err := net.Dial("tcp", listener.Addr().String()); err == nil {
		t.Error("the other port listens on")
	}
	if _, err := api.Stat(); err != nil {
		t.Errorf("a socket that is not of forwards was touched: %v", err)
	}
	f.mu.Lock()
	held := f.leases[key{false, first}].state
	f.mu.Unlock()
	if held != StateListening {
		t.Errorf("state %s", held)
	}
}

func TestForgetWaitsForTheManagerAndNotForEver(t *testing.T) {
	t.Parallel()
	m := startManager(t, false)
	store := FDStore{Socket: m.path, Timeout: 50 * time.Millisecond}
	if err := store.Forget("forward-x"); err != nil {
		t.Errorf("forget: %v", err)
	}
	m.mu.Lock()
	m.deaf = true
	m.mu.Unlock()
	if err := store.Forget("forward-x"); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("forget, by a manager that does not answer: %v", err)
	}
	if err := (FDStore{Socket: m.path + "-absent"}).Forget("forward-x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("forget, without a manager: %v", err)
	}
	for _, name := range []string{"", "a:b", "a\nFDSTORE=1", "ä", strings.Repeat("x", 256)} {
		if err := store.Keep(name, m.socket); err == nil {
			t.Errorf("kept as %q", name)
		}
	}
}

func TestKeepNames(t *testing.T) {
	t.Parallel()
	for want, l := range map[string]Lease{
		"forward-tcp-127.0.0.1-12000": {HostPort: 12000},
		"forward-udp-__1-53":          {HostPort: 53, UDP: true, BindAddress: "::1"},
		"forward-tcp-10.0.0.1-80":     {HostPort: 80, BindAddress: "::ffff:10.0.0.1"},
	} {
		if got := l.keepName(); got != want || checkName(got) != nil {
			t.Errorf("%+v: %q, want %q", l, got, want)
		}
	}
}
