// Package forward makes ports of sandboxes reachable on the host: it leases
// host ports, listens on them, carries TCP connections and UDP flows into
// sandboxes, and knows which of them are in use.
//
// A lease goes through three calls. Reserve picks the numbers and binds
// nothing, so that the caller can record them first. Open binds a recorded
// lease and serves it. Release ends all that goes through it, and only then
// may the number be leased again. The leases here live in memory; after a
// restart the caller opens what it has recorded.
//
// It knows nothing of drivers and guests: a Backend leads it into a sandbox.
// It starts nothing, stops nothing, never shares a port with another program,
// and never looks at what it carries.
package forward

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Backend leads into sandboxes.
type Backend interface {
	// Connect opens a connection to a port inside a sandbox and returns it with
	// the number of the boot that it leads to. If the sandbox does not run it is
	// started first, and Connect waits for it. It counts as activity. It returns
	// soon after ctx ends; that ends the waiting and not the boot. The Forwarder
	// closes the connection.
	//
	// A TCP connection that is a *net.TCPConn or a stream *net.UnixConn itself,
	// not wrapped, is carried without a buffer while idle and by the kernel in
	// bulk. Others should have CloseWrite() error; without it the end of what the
	// client sends cannot be passed on, and ends the connection.
	//
	// On a UDP connection each Read and each Write is one datagram.
	Connect(ctx context.Context, sandbox string, port uint16, udp bool) (conn net.Conn, generation uint64, err error)

	// Active says that a sandbox is in use. It is called when a connection of
	// the sandbox is made or ends, and every Config.ActivityInterval while one is
	// open, from several goroutines. It must not block.
	Active(sandbox string)
}

// Lease is a host port that leads to a port inside a sandbox. The number is
// the sandbox's for this protocol at every address of the host.
type Lease struct {
	Sandbox   string
	Name      string
	GuestPort uint16
	HostPort  uint16 // 0: to be picked by Reserve
	UDP       bool
	// BindAddress is a literal IP address; empty: 127.0.0.1.
	BindAddress string
	// Auto says that nobody declared it: the port was found inside.
	Auto bool
}

// Protocol is "tcp" or "udp".
func (l Lease) Protocol() string {
	if l.UDP {
		return "udp"
	}
	return "tcp"
}

// Config is what a Forwarder is made of. Zero means the default, where one is
// named.
type Config struct {
	// Backend is required.
	Backend Backend
	// First and Last bound the ports that Reserve picks from: 12000 to 12999.
	First, Last uint16
	// MaxConnections bounds TCP connections and UDP flows of one sandbox, 4096;
	// MaxTotal those of all, 32768 or what the limit on open files allows.
	MaxConnections, MaxTotal int
	// MaxPending bounds those of one sandbox that wait for Connect: 256.
	MaxPending int
	// MaxFlows bounds UDP flows of one lease, 1024; FlowTimeout ends one that
	// was silent for so long, 60 s.
	MaxFlows    int
	FlowTimeout time.Duration
	// ActivityInterval is the pause between two calls of Backend.Active: 5 s.
	ActivityInterval time.Duration
	// Keeper keeps listening sockets across restarts; nil: nobody does.
	Keeper Keeper
	// Inherited are sockets that a Keeper kept, by the name each was kept under,
	// as activation.Files of go-systemd returns them. New takes those whose names
	// begin with KeepPrefix, and leaves the others alone.
	Inherited []*os.File
	// Log may be nil.
	Log *slog.Logger
}

func (c Config) withDefaults() Config {
	defaults := func(field *int, value int) {
		if *field <= 0 {
			*field = value
		}
	}
	if c.First == 0 && c.Last == 0 {
		c.First, c.Last = 12000, 12999
	}
	defaults(&c.MaxConnections, 4096)
	defaults(&c.MaxTotal, 32768)
	defaults(&c.MaxPending, 256)
	defaults(&c.MaxFlows, 1024)
	if c.FlowTimeout <= 0 {
		c.FlowTimeout = time.Minute
	}
	if c.ActivityInterval <= 0 {
		c.ActivityInterval = 5 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil && files.Cur < 1<<31 {
		// Two descriptors each, and half of all for the rest of the agent.
		c.MaxTotal = max(min(c.MaxTotal, int(files.Cur)/4), 16)
	}
	return c
}

// Forwarder holds leases and carries what comes in through them. Its methods
// are safe for concurrent use.
type Forwarder struct {
	cfg     Config
	ctx     context.Context //nolint:containedctx // it is the Forwarder's life, ended by Close
	cancel  context.CancelFunc
	wg      sync.WaitGroup // the ticker and the leases
	buffers *buffers
	// stall is how long a side may take nothing before the other is looked at.
	stall time.Duration
	// patience is the pause between two looks at a client that half-closed and
	// waits for a sandbox to start.
	patience time.Duration
	began    time.Time

	mu        sync.Mutex
	closed    bool
	leases    map[key]*lease
	sandboxes map[string]*tally
	total     int
	releases  uint64         // counts releases, for released
	released  map[key]uint64 // when a number was last released; absent: never
	past      [2]Totals      // of released leases, by protocol
	inherited []*inherited
}

// key is a number on the host.
type key struct {
	udp  bool
	port uint16
}

// tally counts what goes into one sandbox.
type tally struct {
	leases  int
	open    int // pending ones too
	pending int
	// cutoff is the last boot that has ended; what leads to it is closed.
	cutoff uint64
}

// New returns a Forwarder without leases. The caller closes it.
func New(cfg Config) *Forwarder {
	cfg = cfg.withDefaults()
	ctx, cancel := context.WithCancel(context.Background())
	f := &Forwarder{
		cfg: cfg, ctx: ctx, cancel: cancel, buffers: newBuffers(),
		stall: 10 * time.Second, patience: 500 * time.Millisecond,
		leases: map[key]*lease{}, sandboxes: map[string]*tally{},
		released: map[key]uint64{}, began: time.Now(),
	}
	f.inherit(cfg.Inherited)
	f.wg.Go(f.tick)
	return f
}

// Close stops listening, closes all connections, and returns once all is
// over. What the Keeper keeps stays with it: clients that connect from now on
// wait for the next Forwarder.
func (f *Forwarder) Close() error {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil
	}
	f.closed = true
	unclaimed := f.inherited
	f.inherited = nil
	f.mu.Unlock()
	f.cancel()
	f.wg.Wait()
	f.buffers.close()
	var errs []error
	for _, socket := range unclaimed {
		errs = append(errs, socket.Close())
	}
	return errors.Join(errs...)
}

// tick tells the backend what is in use, and ends flows that are silent.
func (f *Forwarder) tick() {
	active := time.NewTicker(f.cfg.ActivityInterval)
	defer active.Stop()
	silent := time.NewTicker(max(f.cfg.FlowTimeout/8, 10*time.Millisecond))
	defer silent.Stop()
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-active.C:
			for _, name := range f.inUse() {
				f.cfg.Backend.Active(name)
			}
		case <-silent.C:
			f.endSilentFlows()
		}
	}
}

// awake is a clock in nanoseconds that nobody sets, and that stands still while
// the host sleeps: clients and sandboxes are not silent then.
func (f *Forwarder) awake() int64 { return int64(time.Since(f.began)) }

func (f *Forwarder) inUse() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var names []string
	for name, t := range f.sandboxes {
		if t.open > 0 {
			names = append(names, name)
		}
	}
	return names
}

// CutOff closes, with a reset, what is open to a boot of the sandbox up to
// and including generation, now and from now on. Listeners stay, and so does
// what waits for a later boot. What the sandbox had sent to its end is still
// delivered.
func (f *Forwarder) CutOff(sandbox string, generation uint64) {
	for _, c := range f.end(sandbox, generation) {
		c.abort()
	}
}

// carrier is what carries: a connection or a flow.
type carrier interface {
	abort()
	// relayed says that the sandbox's side is no socket of the sandbox's own but
	// goes over some channel. It is asked once there is that side.
	relayed() bool
}

// end moves the sandbox's cutoff and returns what it cuts off.
func (f *Forwarder) end(sandbox string, generation uint64) []carrier {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := f.sandboxes[sandbox]
	if t == nil {
		return nil
	}
	t.cutoff = max(t.cutoff, generation)
	var past []carrier
	for _, l := range f.leases {
		if l.Sandbox != sandbox {
			continue
		}
		for c, boot := range l.carriers {
			if boot != 0 && boot <= t.cutoff {
				past = append(past, c)
			}
		}
	}
	return past
}

// OpenConnections counts the connections and flows of a sandbox, those that wait included.
func (f *Forwarder) OpenConnections(sandbox string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if t := f.sandboxes[sandbox]; t != nil {
		return t.open
	}
	return 0
}

var (
	errTooMany  = errors.New("too many connections")
	errEnded    = errors.New("the sandbox stopped")
	errReleased = errors.New("the port was released")
)

// enter counts something that is about to wait for Connect.
func (l *lease) enter(c carrier) error {
	f := l.f
	f.mu.Lock()
	defer f.mu.Unlock()
	t := f.sandboxes[l.Sandbox]
	if t.open >= f.cfg.MaxConnections || t.pending >= f.cfg.MaxPending || f.total >= f.cfg.MaxTotal {
		l.counters.Refused++
		return errTooMany
	}
	f.total++
	t.open++
	t.pending++
	l.counters.Open++
	l.counters.Pending++
	l.counters.Accepted++
	l.carriers[c] = 0
	return nil
}

// connected counts it as waiting no longer. It reports whether it may go on:
// the lease is still served and the boot that it leads to has not ended.
func (l *lease) connected(c carrier, generation uint64, err error) error {
	f := l.f
	f.mu.Lock()
	defer f.mu.Unlock()
	t := f.sandboxes[l.Sandbox]
	t.pending--
	l.counters.Pending--
	switch {
	case err != nil:
	case l.ctx.Err() != nil:
		err = context.Cause(l.ctx)
	case generation != 0 && generation <= t.cutoff:
		err = errEnded
	}
	l.lastError = ""
	if err != nil {
		l.counters.Failed++
		l.lastError = err.Error()
		return err
	}
	l.carriers[c] = max(generation, 1)
	return nil
}

// leave counts it as over.
func (l *lease) leave(c carrier) {
	f := l.f
	f.mu.Lock()
	defer f.mu.Unlock()
	f.total--
	f.sandboxes[l.Sandbox].open--
	l.counters.Open--
	delete(l.carriers, c)
}
