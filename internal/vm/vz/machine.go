package vz

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/choiros/agent/internal/vm"
)

const (
	// killTimeout is how long a machine whose power was cut may take to be gone.
	killTimeout = 10 * time.Second
	// stopInterval is how often a machine that would not stop is told again.
	stopInterval = time.Second
)

var _ vm.Machine = (*machine)(nil)

// machine is the only implementation of vm.Machine here.
type machine struct {
	config        vm.Config
	configuration configuration
	savable       error // why no state can be saved here; may be nil
	vm            virtualMachine
	device        socketDevice
	null          *os.File // the console's other end, if nobody gave one
	done          chan struct{}
	// turn is held until the machine runs, and while the framework changes its
	// state, also by a call that nobody waits for any more.
	turn chan struct{}
	// dials holds one for each Connect that the framework has not answered.
	dials chan struct{}

	mu         sync.Mutex
	stage      stage
	poweringOn bool // the framework has not answered whether it starts
	killed     bool
	stopping   bool // somebody is at it
	stopErr    error
	changed    chan struct{} // closed, and replaced, when something of the above or the state changes
	listeners  []*listener
	err        error // once done is closed
}

type stage int

const (
	stageNew stage = iota
	stageStarted
	stageEnded
)

// newMachine is New over a framework. Its errors leave nothing behind.
func newMachine(f framework, config vm.Config, options Options) (*machine, error) {
	m := &machine{
		config: config, done: make(chan struct{}), changed: make(chan struct{}),
		turn: make(chan struct{}, 1), dials: make(chan struct{}, maxDials),
	}
	m.turn <- struct{}{}
	if err := m.prepare(f, options); err != nil {
		m.releaseFiles()
		return nil, err
	}
	return m, nil
}

func (m *machine) prepare(f framework, options Options) error {
	if m.config.Console == nil {
		// The guest has the same devices whether somebody looks or not.
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		m.null = null
	}
	plan, err := draw(f, m.config, options)
	if err != nil {
		return err
	}
	if plan.Console == nil {
		plan.Console = m.null
	}
	if m.configuration, err = f.NewVirtualMachineConfiguration(plan); err != nil {
		return said(err)
	}
	valid, err := m.configuration.Validate()
	if err == nil && !valid {
		err = &nsError{Domain: vzDomain, Code: vzInvalidConfiguration}
	}
	if err != nil {
		return explainConfiguration(f, err)
	}
	m.savable = m.checkSavable(f)
	if m.config.Restore != "" && m.savable != nil {
		return fmt.Errorf("restore: %w", m.savable)
	}
	if m.vm, err = m.configuration.NewVirtualMachine(); err != nil {
		return said(err)
	}
	devices := m.vm.SocketDevices()
	if len(devices) != 1 {
		return fmt.Errorf("the machine has %d socket devices, not one", len(devices))
	}
	m.device = devices[0]
	return nil
}

func (m *machine) Start(ctx context.Context) error {
	m.mu.Lock()
	if m.stage != stageNew {
		defer m.mu.Unlock()
		if m.stage == stageEnded {
			return errNotRunning
		}
		return errStarted
	}
	m.stage, m.poweringOn = stageStarted, true
	m.mu.Unlock()
	go m.watch()
	err := await(ctx, m.powerOn, nil)
	if err == nil {
		return nil
	}
	if m.config.Restore == "" {
		err = explainStart(m.config, err)
	}
	if killed := m.Kill(); killed != nil {
		return errors.Join(err, killed)
	}
	return err
}

// powerOn brings the machine to where its processors run.
func (m *machine) powerOn() error {
	err := m.boot()
	m.mu.Lock()
	m.poweringOn = false
	m.mu.Unlock()
	<-m.turn
	m.note()
	return err
}

func (m *machine) boot() error {
	if m.config.Restore == "" {
		if err := m.vm.Start(); err != nil {
			return err
		}
		return m.openListeners()
	}
	if err := m.vm.RestoreMachineStateFromURL(inDir(m.config, m.config.Restore)); err != nil {
		return fmt.Errorf("restore: %w: %w", vm.ErrCannotSave, said(err))
	}
	// It is paused now, and calls once it is not.
	if err := m.openListeners(); err != nil {
		return err
	}
	return said(m.vm.Resume())
}

// watch takes notice of the machine's states until it has ended.
func (m *machine) watch() {
	states := m.vm.StateChangedNotify()
	for {
		select {
		case _, open := <-states:
			m.note()
			if !open {
				return
			}
		case <-m.done:
			return
		}
	}
}

// note tells whoever waits that something has changed, and ends the machine if
// it has stopped. What is before the framework's answer to being started is no
// end: a machine that is new has stopped, too.
func (m *machine) note() {
	m.mu.Lock()
	m.tell()
	early := m.poweringOn || m.stage != stageStarted
	m.mu.Unlock()
	if early {
		return
	}
	switch m.vm.State() {
	case stateStopped:
		m.end(nil)
	case stateError:
		m.end(errors.New("the machine failed; macOS says why in its log alone: log show --last 5m --predicate 'subsystem BEGINSWITH \"com.apple.Virtualization\"'"))
	}
}

// tell wakes whoever waits for a change. Its caller holds mu.
func (m *machine) tell() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// end releases all that is the machine's, and tells that it is over.
func (m *machine) end(err error) {
	m.mu.Lock()
	if m.stage == stageEnded {
		m.mu.Unlock()
		return
	}
	m.stage = stageEnded
	listeners := m.listeners
	m.listeners = nil
	if !m.killed {
		m.err = err
	}
	m.mu.Unlock()
	for _, l := range listeners {
		_ = l.Close() // it has ended for whoever listens, whatever the framework says
	}
	m.releaseFiles()
	close(m.done)
}

func (m *machine) releaseFiles() {
	if m.config.Network != nil {
		m.config.Network.Close()
	}
	if m.null != nil {
		m.null.Close()
	}
}

func (m *machine) PressPower(ctx context.Context) error {
	if err := m.running(); err != nil {
		return err
	}
	return await(ctx, func() error {
		if !m.vm.CanRequestStop() {
			return errors.New("press the power button: the machine is paused, or is ending")
		}
		asked, err := m.vm.RequestStop()
		if err == nil && !asked {
			err = errors.New("macOS did not")
		}
		if err != nil {
			return fmt.Errorf("press the power button: %w", said(err))
		}
		return nil
	}, nil)
}

// running is an error unless the machine was started and has not ended.
func (m *machine) running() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stage != stageStarted {
		return errNotRunning
	}
	return nil
}

func (m *machine) Kill() error {
	m.mu.Lock()
	stage, busy := m.stage, m.stopping
	if stage != stageEnded {
		m.killed = true
	}
	if stage == stageStarted {
		m.stopping = true
	}
	m.mu.Unlock()
	switch {
	case stage == stageNew:
		m.end(nil)
	case stage == stageStarted && !busy:
		go m.stop()
	}
	select {
	case <-m.done:
		return nil
	case <-time.After(killTimeout):
		m.mu.Lock()
		defer m.mu.Unlock()
		return errors.Join(fmt.Errorf("kill: not gone after %v", killTimeout), m.stopErr)
	}
}

// stop stops the machine as soon as the framework can do that, which it cannot
// while it starts, saves or restores. It returns when the machine has ended.
func (m *machine) stop() {
	for {
		m.mu.Lock()
		changed, starting := m.changed, m.poweringOn
		m.mu.Unlock()
		now := m.vm.State()
		if !starting && (now == stateStopped || now == stateError) {
			m.end(nil)
			return
		}
		var again <-chan time.Time
		if m.vm.CanStop() {
			err := m.vm.Stop()
			if err == nil {
				m.end(nil)
				return
			}
			m.mu.Lock()
			m.stopErr = said(err)
			m.mu.Unlock()
			// Its state has changed, to and fro, which says nothing.
			again, changed = time.After(stopInterval), nil
		}
		select {
		case <-changed:
		case <-again:
		case <-m.done:
			return
		}
	}
}

func (m *machine) Listen(port uint32) (net.Listener, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stage != stageNew {
		return nil, fmt.Errorf("listen at vsock port %d: %w", port, errStarted)
	}
	for _, l := range m.listeners {
		if l.port == port {
			return nil, fmt.Errorf("listen at vsock port %d: somebody does", port)
		}
	}
	l := newListener(port)
	m.listeners = append(m.listeners, l)
	return l, nil
}

func (m *machine) Done() <-chan struct{} { return m.done }

func (m *machine) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

func (m *machine) Close() error { return m.Kill() }

// change makes a call that changes the machine's state, once those before it
// are over. See await.
func (m *machine) change(ctx context.Context, call func() error, abandoned func()) error {
	select {
	case m.turn <- struct{}{}:
	case <-m.done:
		return errNotRunning
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return await(ctx, func() error {
		defer func() { <-m.turn }()
		return call()
	}, abandoned)
}

// await returns what a call returns, unless ctx ends before. Then nobody gets
// what the call does, and abandoned, unless nil, is called once it has done it
// without an error.
func await(ctx context.Context, call func() error, abandoned func()) error {
	answer := make(chan error, 1)
	var taken atomic.Bool
	go func() {
		err := call()
		if taken.CompareAndSwap(false, true) {
			answer <- err
		} else if err == nil && abandoned != nil {
			abandoned()
		}
	}()
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		if taken.CompareAndSwap(false, true) {
			return context.Cause(ctx)
		}
		return <-answer
	}
}
