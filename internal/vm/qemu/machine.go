//go:build linux

package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/digitalocean/go-qemu/qmp"

	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/qemu/vhost"
)

// killTimeout is how long a killed process may take to be gone: one that the
// kernel holds on to, in a read of a dead network disk say, ends later.
const killTimeout = 10 * time.Second

var (
	errStarted    = errors.New("the machine was started before")
	errNotRunning = errors.New("the machine does not run")
)

// machine is the only implementation of vm.Machine here.
type machine struct {
	options   Options
	plan      plan
	qemuPath  string
	virtiofsd string        // path
	sandbox   string        // of virtiofsd
	device    *os.File      // the kernel's of vsock, or
	vsock     *vhost.Device // one of our own
	dir       folder
	transport transport
	children  *children
	done      chan struct{}
	// full is sent to when QEMU halts for want of room on the host's disk, and
	// stalled is what vm.Staller says of it.
	full    chan struct{}
	stalled chan bool

	// changing is held while its state is changed: paused, resumed, saved.
	changing sync.Mutex
	paused   bool // and not to go on by itself

	mu        sync.Mutex
	stage     stage
	killed    bool
	shutdown  string // reason in QEMU's SHUTDOWN event
	broken    error  // what the guest has done to its vsock device
	plugged   bool   // the vsock device that can be unplugged
	unplugged chan struct{}
	listeners []net.Listener
	mon       *monitor
	err       error // once done is closed
}

type stage int

const (
	stageNew stage = iota
	stageStarted
	stageEnded
)

// New makes a machine of config, whose Dir must be there, and starts nothing.
// Unless the accelerator is given it tries KVM, which ctx can end. It takes
// over config.Network, also on an error. A *MissingError is in the errors about
// programs that are not there.
func New(ctx context.Context, config vm.Config, options Options) (vm.Machine, error) {
	m := &machine{options: options, done: make(chan struct{}), full: make(chan struct{}, 1), stalled: make(chan bool, 1)}
	m.plan.config = config
	if err := m.prepare(ctx); err != nil {
		m.release()
		return nil, err
	}
	return m, nil
}

func (m *machine) prepare(ctx context.Context) error {
	config := &m.plan.config
	var err error
	if m.qemuPath, err = m.options.qemuPath(config.Arch); err != nil {
		return err
	}
	if err := check(*config); err != nil {
		return err
	}
	if len(config.Shares) > 0 {
		if m.virtiofsd, err = m.options.virtiofsdPath(); err != nil {
			return err
		}
		m.sandbox = shareSandbox(ctx, m.virtiofsd)
	}
	if m.dir, err = openFolder(config.Dir); err != nil {
		return err
	}
	if m.plan.accelerator, _, err = m.options.accelerator(ctx, m.qemuPath, config.Arch); err != nil {
		return err
	}
	if m.plan.accelerator == TCG {
		config.Cmdline += emulatedWords(config.Arch)
	}
	if m.device, m.plan.cid, err = claimCID(); err == nil {
		m.plan.vsock, m.transport = vsockKernel, kernelGuest{m.plan.cid}
		config.Cmdline += cidPortsWord
	} else {
		m.vsock = vhost.New(userCID)
		m.plan.vsock, m.transport = vsockUser, userVsock{m.vsock}
	}
	m.children = newChildren(config.Dir)
	return nil
}

func (m *machine) Start(ctx context.Context) error {
	m.changing.Lock()
	defer m.changing.Unlock()
	m.mu.Lock()
	if m.stage != stageNew {
		defer m.mu.Unlock()
		if m.stage == stageEnded {
			return errNotRunning
		}
		return errStarted
	}
	m.stage = stageStarted
	m.mu.Unlock()
	err := m.launch(ctx)
	if err == nil {
		if err = m.powerOn(ctx); err == nil {
			return nil
		}
	}
	return m.abandon(err)
}

// launch starts the processes, and whoever waits for their end.
func (m *machine) launch(ctx context.Context) error {
	mine, theirs, err := socketpair("qmp")
	if err != nil {
		m.end(err)
		return err
	}
	defer mine.Close()
	pass := passing{}
	defer pass.close()
	m.plan.fds.qmp = pass.add(theirs)
	if network := m.plan.config.Network; network != nil {
		m.plan.fds.network = pass.lend(network)
	}
	if err := m.launchHelpers(&pass); err != nil {
		m.end(err)
		return err
	}
	conn, err := net.FileConn(mine)
	if err != nil {
		m.end(err)
		return err
	}
	console := m.plan.config.Console
	qemu, err := m.children.start("qemu", m.qemuPath, m.plan.arguments(), console, console, pass.files...)
	if err != nil {
		conn.Close()
		m.end(err)
		return err
	}
	m.mu.Lock()
	m.mon = newMonitor(conn, m.note)
	m.mu.Unlock()
	go m.watch(qemu)
	go m.awaitRoom()
	return nil
}

func (m *machine) launchHelpers(pass *passing) error {
	for i := range m.plan.config.Shares {
		conn, err := m.startShare(i)
		if err != nil {
			return err
		}
		m.plan.fds.shares = append(m.plan.fds.shares, pass.add(conn))
	}
	if m.plan.vsock == vsockKernel {
		m.plan.fds.vsock = pass.lend(m.device)
		return nil
	}
	if m.plan.config.Restore != "" {
		return nil // it is plugged in later
	}
	conn, err := m.serveVsock()
	if err != nil {
		return err
	}
	m.plan.fds.vsock = pass.add(conn)
	m.plugged = true
	return nil
}

// serveVsock has the device serve another front end, and returns the end of the
// connection that is QEMU's.
func (m *machine) serveVsock() (*os.File, error) {
	mine, theirs, err := socketpair("vhost-user")
	if err != nil {
		return nil, err
	}
	defer mine.Close()
	conn, err := net.FileConn(mine)
	if err != nil {
		theirs.Close()
		return nil, err
	}
	go func() {
		if err := m.vsock.Serve(conn.(*net.UnixConn)); err != nil { //nolint:forcetypeassert // It is one of a pair of them.
			m.mu.Lock()
			m.broken = fmt.Errorf("vsock: %w", err)
			m.mu.Unlock()
			m.children.signal()
		}
	}()
	return theirs, nil
}

// powerOn brings a QEMU that has just started to where its processors run.
func (m *machine) powerOn(ctx context.Context) error {
	if err := m.mon.connect(ctx); err != nil {
		return err
	}
	if m.plan.config.Restore != "" {
		if err := m.restore(ctx); err != nil {
			return err
		}
	}
	return m.mon.run(ctx, "cont", nil, nil)
}

// abandon ends a machine that did not start, and says why it did not.
func (m *machine) abandon(err error) error {
	if errors.Is(err, errMonitorClosed) {
		// QEMU has ended, or is about to, and its last words say more.
		select {
		case <-m.done:
			if m.err != nil {
				return m.err
			}
		case <-time.After(farewell):
		}
	}
	if killed := m.Kill(); killed != nil {
		return errors.Join(err, killed)
	}
	return err
}

// note takes QEMU's events.
func (m *machine) note(event qmp.Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch event.Event {
	case "SHUTDOWN":
		m.shutdown, _ = event.Data["reason"].(string)
	case "BLOCK_IO_ERROR":
		m.noteDiskError(event.Data)
	case "DEVICE_DELETED":
		if event.Data["device"] == vsockDevice {
			m.plugged = false
			if m.unplugged != nil {
				close(m.unplugged)
				m.unplugged = nil
			}
		}
	}
}

// watch waits until one of the processes ends, and ends the machine.
func (m *machine) watch(qemu *child) {
	first := <-m.children.fall
	if first != qemu && first.cmd.ProcessState.Exited() {
		// QEMU lets go of its helpers, which end then, before it ends itself.
		select {
		case <-qemu.ended:
			first = qemu
		case <-time.After(farewell):
		}
	}
	if first == qemu {
		<-m.mon.ended // so that all it said was taken in
	}
	m.end(m.verdict(qemu, first))
}

// verdict is why the machine ended, whose process first ended first.
func (m *machine) verdict(qemu, first *child) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.killed:
		return nil
	case m.broken != nil:
		return m.broken
	case first != qemu || qemu.err != nil:
		return first.failure()
	}
	switch m.shutdown {
	case "guest-shutdown":
		return nil
	case "guest-reset", "guest-panic":
		return fmt.Errorf("the guest ended with %s", m.shutdown)
	}
	return first.failure()
}

// end ends whatever runs and releases it, and tells that it is over.
func (m *machine) end(err error) {
	m.children.kill()
	m.mu.Lock()
	mon := m.mon
	m.mu.Unlock()
	if mon != nil {
		mon.close()
	}
	m.release()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stage = stageEnded
	if !m.killed {
		m.err = err
	}
	close(m.done)
}

// release gives back all that is the machine's but its processes.
func (m *machine) release() {
	m.mu.Lock()
	listeners := m.listeners
	m.stage, m.listeners = stageEnded, nil
	m.mu.Unlock()
	for _, l := range listeners {
		l.Close()
	}
	if m.plan.config.Network != nil {
		m.plan.config.Network.Close()
	}
	if m.device != nil {
		m.device.Close()
	}
	if m.vsock != nil {
		m.vsock.Close()
	}
	if m.dir.file != nil {
		m.dir.file.Close()
	}
}

func (m *machine) PressPower(ctx context.Context) error {
	mon, err := m.running()
	if err != nil {
		return err
	}
	return mon.run(ctx, "system_powerdown", nil, nil)
}

// running is the monitor of a machine that was started and has not ended.
func (m *machine) running() (*monitor, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stage != stageStarted || m.mon == nil {
		return nil, errNotRunning
	}
	return m.mon, nil
}

func (m *machine) Kill() error {
	m.mu.Lock()
	stage := m.stage
	if stage != stageEnded {
		m.killed = true
	}
	m.mu.Unlock()
	switch stage {
	case stageNew:
		return m.Close()
	case stageStarted:
		m.children.signal()
	}
	select {
	case <-m.done:
		return nil
	case <-time.After(killTimeout):
		return fmt.Errorf("kill: not gone after %v", killTimeout)
	}
}

func (m *machine) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if _, err := m.running(); err != nil {
		return nil, fmt.Errorf("dial vsock port %d: %w: %w", port, vm.ErrNoListener, err)
	}
	conn, err := m.transport.dial(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("dial vsock port %d: %w", port, err)
	}
	return conn, nil
}

func (m *machine) Listen(port uint32) (net.Listener, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stage != stageNew {
		return nil, fmt.Errorf("listen at vsock port %d: %w", port, errStarted)
	}
	listener, err := m.transport.listen(port)
	if err != nil {
		return nil, fmt.Errorf("listen at vsock port %d: %w", port, err)
	}
	m.listeners = append(m.listeners, listener)
	return listener, nil
}

func (m *machine) Done() <-chan struct{} { return m.done }

func (m *machine) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

func (m *machine) Close() error {
	m.mu.Lock()
	fresh := m.stage == stageNew
	if fresh {
		m.stage, m.killed = stageStarted, true
	}
	m.mu.Unlock()
	if fresh {
		m.end(nil)
		return nil
	}
	return m.Kill()
}

// passing are the descriptors that a child inherits, and those that are then
// closed here.
type passing struct {
	files, ours []*os.File
}

// lend is the number in the child of a descriptor that stays open here.
func (p *passing) lend(file *os.File) int {
	p.files = append(p.files, file)
	return 2 + len(p.files)
}

// add is the number in the child of a descriptor that is the child's alone.
func (p *passing) add(file *os.File) int {
	p.ours = append(p.ours, file)
	return p.lend(file)
}

func (p *passing) close() {
	for _, file := range p.ours {
		file.Close()
	}
}
