package vz

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/vm"
)

// standIn is a framework that records what it is asked for, and whose machines
// go through the states that the real ones do. Its fields are set before use.
type standIn struct {
	goarch, version         string
	noHypervisor            bool
	mostCPUs                uint
	mostMemory              uint64
	rosetta                 rosettaAvailability
	refuses                 func(blueprint) error // Validate's error
	configureErr, unsavable error
	prepare                 func(*standInMachine)

	identifiers int
	blueprints  []blueprint // but those of the smallest machine
	machine     *standInMachine
}

func newStandIn() *standIn {
	return &standIn{goarch: "arm64", version: "15.2", mostCPUs: 8, mostMemory: 16 << 30}
}

const smallestMemory = 4 << 20

func (s *standIn) GOARCH() string                  { return s.goarch }
func (s *standIn) ProductVersion() (string, error) { return s.version, nil }

func (s *standIn) HypervisorSupport() (bool, error)                            { return !s.noHypervisor, nil }
func (s *standIn) VirtualMachineConfigurationMinimumAllowedCPUCount() uint     { return 1 }
func (s *standIn) VirtualMachineConfigurationMaximumAllowedCPUCount() uint     { return s.mostCPUs }
func (s *standIn) VirtualMachineConfigurationMinimumAllowedMemorySize() uint64 { return smallestMemory }

func (s *standIn) VirtualMachineConfigurationMaximumAllowedMemorySize() uint64 { return s.mostMemory }
func (s *standIn) LinuxRosettaDirectoryShareAvailability() rosettaAvailability { return s.rosetta }

func (s *standIn) NewGenericMachineIdentifier() ([]byte, error) {
	s.identifiers++
	return []byte{'i', 'd', byte('0' + s.identifiers)}, nil
}

func (s *standIn) NewVirtualMachineConfiguration(b blueprint) (configuration, error) {
	if b.MemorySize != smallestMemory {
		s.blueprints = append(s.blueprints, b)
		if s.configureErr != nil {
			return nil, s.configureErr
		}
	}
	return &standInConfiguration{s, b}, nil
}

type standInConfiguration struct {
	*standIn
	plan blueprint
}

func (c *standInConfiguration) Validate() (bool, error) {
	if c.refuses != nil {
		if err := c.refuses(c.plan); err != nil {
			return false, err
		}
	}
	return true, nil
}

func (c *standInConfiguration) ValidateSaveRestoreSupport() (bool, error) {
	return c.unsavable == nil, c.unsavable
}

func (c *standInConfiguration) NewVirtualMachine() (virtualMachine, error) {
	m := &standInMachine{
		states: make(chan state, 64), inside: map[uint32]chan net.Conn{},
		listeners: map[uint32]*standInListener{}, unstoppable: map[state]bool{},
	}
	if c.prepare != nil {
		c.prepare(m)
	}
	c.machine = m
	return m, nil
}

// States that only pass.
const (
	stateStarting  state = 4
	statePausing   state = 5
	stateResuming  state = 6
	stateStopping  state = 7
	stateSaving    state = 8
	stateRestoring state = 9
)

// standInMachine is a machine and its guest. Errors and holds are set before use.
type standInMachine struct {
	startErr, stopErr, pauseErr, resumeErr, saveErr, restoreErr, connectErr error
	// hold, unless nil, is received from by the call it is named for.
	holdStart, holdPause, holdSave, holdConnect chan struct{}
	unstoppable                                 map[state]bool
	deaf                                        bool // to the power button

	states chan state

	mu        sync.Mutex
	now       state
	calls     []string
	inside    map[uint32]chan net.Conn // ports that something listens at inside
	listeners map[uint32]*standInListener
}

func (m *standInMachine) called(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls = append(m.calls, name)
}

func (m *standInMachine) record() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return strings.Join(m.calls, " ")
}

func (m *standInMachine) become(s state) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now = s
	m.states <- s
}

// pass goes from one state to the next by way of another, or back.
func (m *standInMachine) pass(name string, from, by, to state, hold chan struct{}, err error) error {
	m.called(name)
	if m.State() != from {
		return &nsError{Domain: vzDomain, Code: 4, LocalizedDescription: "Invalid state transition."}
	}
	m.become(by)
	if hold != nil {
		<-hold
	}
	if err != nil {
		m.become(from)
		return err
	}
	m.become(to)
	return nil
}

func (m *standInMachine) Start() error {
	return m.pass("start", stateStopped, stateStarting, stateRunning, m.holdStart, m.startErr)
}

func (m *standInMachine) Pause() error {
	return m.pass("pause", stateRunning, statePausing, statePaused, m.holdPause, m.pauseErr)
}

func (m *standInMachine) Resume() error {
	return m.pass("resume", statePaused, stateResuming, stateRunning, nil, m.resumeErr)
}

func (m *standInMachine) Stop() error {
	return m.pass("stop", m.State(), stateStopping, stateStopped, nil, m.stopErr)
}

func (m *standInMachine) RequestStop() (bool, error) {
	m.called("request-stop")
	return !m.deaf, nil
}

func (m *standInMachine) CanStop() bool {
	s := m.State()
	return (s == stateRunning || s == statePaused) && !m.unstoppable[s]
}

func (m *standInMachine) CanRequestStop() bool { return m.State() == stateRunning }

func (m *standInMachine) SaveMachineStateToPath(path string) error {
	// A save that fails may have written something.
	if err := os.WriteFile(path, []byte("state"), 0o644); err != nil {
		return err
	}
	return m.pass("save", statePaused, stateSaving, statePaused, m.holdSave, m.saveErr)
}

func (m *standInMachine) RestoreMachineStateFromURL(path string) error {
	if !filepath.IsAbs(path) {
		panic("restore " + path)
	}
	return m.pass("restore", stateStopped, stateRestoring, statePaused, nil, m.restoreErr)
}

func (m *standInMachine) State() state {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.now
}

func (m *standInMachine) StateChangedNotify() <-chan state { return m.states }

func (m *standInMachine) SocketDevices() []socketDevice { return []socketDevice{standInDevice{m}} }

type standInDevice struct{ *standInMachine }

// connection has the shape of vz.VirtioSocketConnection.
type connection struct {
	net.Conn   // so that it has the methods
	rawConn    net.Conn
	sourcePort uint32
}

func (c *connection) SourcePort() uint32 { return c.sourcePort }

// Connect is what the framework does: for a guest in which nothing listens
// there it says that the connection was reset.
func (d standInDevice) Connect(port uint32) (net.Conn, error) {
	d.called("connect")
	if d.holdConnect != nil {
		<-d.holdConnect
	}
	if d.connectErr != nil {
		return nil, d.connectErr
	}
	d.mu.Lock()
	inside := d.inside[port]
	d.mu.Unlock()
	if inside == nil {
		return nil, &nsError{Domain: posixDomain, Code: darwinECONNRESET, LocalizedDescription: "Connection reset by peer"}
	}
	ours, theirs := connect()
	inside <- theirs
	return &connection{rawConn: ours}, nil
}

func (d standInDevice) Listen(port uint32) (net.Listener, error) {
	l := &standInListener{conns: make(chan *connection)}
	d.called("listen")
	d.mu.Lock()
	d.listeners[port] = l
	d.mu.Unlock()
	return l, nil
}

// standInListener is like vz's: Accept does not return when it is closed.
type standInListener struct {
	net.Listener
	conns  chan *connection
	mu     sync.Mutex
	closed bool
}

func (l *standInListener) Accept() (net.Conn, error) {
	conn, ok := <-l.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return conn, nil
}

func (l *standInListener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	return nil
}

func (l *standInListener) isClosed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

// listener is the framework's listener for a port.
func (m *standInMachine) listener(port uint32) *standInListener {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.listeners[port]
}

// call is the guest's: it connects to a port of the host's, from one of its own.
func (m *standInMachine) call(port, from uint32) net.Conn {
	ours, theirs := connect()
	m.listener(port).conns <- &connection{rawConn: theirs, sourcePort: from}
	return ours
}

// listen has something listen inside.
func (m *standInMachine) listen(port uint32) <-chan net.Conn {
	conns := make(chan net.Conn, 1)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.inside[port] = conns
	return conns
}

// connect makes two connected sockets.
func connect() (a, b net.Conn) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		panic(err)
	}
	var conns []net.Conn
	for _, fd := range fds {
		file := os.NewFile(uintptr(fd), "vsock")
		conn, err := net.FileConn(file)
		file.Close()
		if err != nil {
			panic(err)
		}
		conns = append(conns, conn)
	}
	return conns[0], conns[1]
}

// setup is a configuration whose files are there, and options for it.
func setup(t *testing.T) (vm.Config, Options) {
	t.Helper()
	dir, home := t.TempDir(), t.TempDir()
	for _, name := range []string{"initrd", "root.img", "layer.img"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	writeKernel(t, filepath.Join(dir, "kernel"), map[int]string{24: "\x0a", 56: "ARM\x64"}) // of 4 KiB pages, anywhere
	return vm.Config{
		Dir: dir, Arch: "arm64", CPUs: 2, MemoryMiB: 1024, Kernel: "kernel", Initrd: "initrd", Cmdline: "console=hvc0",
		Disks: []vm.Disk{{Serial: "image", Path: "root.img", ReadOnly: true}, {Serial: "layer", Path: filepath.Join(dir, "layer.img")}},
	}, Options{Home: home}
}

// writeKernel writes a file of zeros with marks at their offsets.
func writeKernel(t *testing.T, path string, marks map[int]string) {
	t.Helper()
	file := make([]byte, 4096)
	for offset, mark := range marks {
		copy(file[offset:], mark)
	}
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
}

// boot makes a machine, and starts it.
func boot(t *testing.T, s *standIn) *machine {
	t.Helper()
	m := fresh(t, s)
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return m
}

func fresh(t *testing.T, s *standIn) *machine {
	t.Helper()
	config, options := setup(t)
	return made(t, s, config, options)
}

func made(t *testing.T, s *standIn, config vm.Config, options Options) *machine {
	t.Helper()
	m, err := newMachine(s, config, options)
	if err != nil {
		t.Fatal(err)
	}
	guest := s.machine
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		guest.mu.Lock()
		defer guest.mu.Unlock()
		for _, l := range guest.listeners {
			close(l.conns) // the pump's end, which on a Mac is the process's
		}
	})
	return m
}

// eventually waits until something is so.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	deadline := time.After(10 * time.Second)
	for !so() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not after 10 s: %s", what)
		}
	}
}

func wantDone(t *testing.T, m *machine) {
	t.Helper()
	select {
	case <-m.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the machine does not end")
	}
}

func wantText(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one with %q", parts)
	}
	if missing := slices.DeleteFunc(slices.Clone(parts), func(part string) bool { return strings.Contains(err.Error(), part) }); len(missing) > 0 {
		t.Errorf("%q does not say %q", err, missing)
	}
	if strings.Contains(err.Error(), "\n") && !strings.Contains(strings.Join(parts, ""), "\n") {
		t.Errorf("an error of several lines: %q", err)
	}
}
