package vm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/shim"
	"github.com/choiros/agent/internal/vm/network"
)

// hostPort is where a machine's guestd calls its shim; see machine.proto.
const hostPort = 1025

// Names of what a shim has in its box.
const (
	bootRecord  = "boot.json"
	layerFile   = "layer.img"
	machineDir  = "machine"
	consoleFile = "console.log"
)

// Serials of the disks that a machine made from an image has.
const (
	imageSerial = "image"
	layerSerial = "layer"
)

// keyBytes is the length of a life's key.
const keyBytes = 32

const sigTerm = int32(syscall.SIGTERM)

const (
	// powerOnLimit is how long a hypervisor may take to start.
	powerOnLimit = 30 * time.Second
	// powerOffLimit is how long a guest may take to switch itself off once its
	// workload has ended and it has put its disks in order.
	powerOffLimit = 20 * time.Second
	// lastWordLimit is how long it may take to read what a guest has sent by
	// the time its machine is off.
	lastWordLimit = 2 * time.Second
)

// RunShim is the main program of a shim, given what follows DriverConfig.Shim; it
// returns the status to exit with. newMachine makes the machine.
func RunShim(args []string, newMachine func(context.Context, Config) (Machine, error)) int {
	if len(args) != 1 {
		fmt.Fprintln(os.Stderr, "a shim is started by the agent, with the folder of its sandbox")
		return 2
	}
	s, err := shim.Enter(args[0])
	if err != nil {
		return 1
	}
	l := &life{Shim: s}
	err = l.begin(newMachine)
	if err != nil {
		l.release()
		s.Fail(err)
		return 1
	}
	if l.savedKey == nil {
		l.progress(l.booting())
	} else {
		l.progress("going on from its memory")
	}
	if err := s.Started(); err != nil {
		l.release()
		return 1
	}
	end := l.supervise()
	l.release()
	if err := s.Finish(end); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// progress tells people how far the machine is. That it cannot is no reason to
// stop.
func (l *life) progress(what string) {
	if err := l.SetProgress(what); err != nil {
		fmt.Fprintln(os.Stderr, "note its progress:", err)
	}
}

// life is one life of one machine, in its shim.
type life struct {
	*shim.Shim
	plan    plan
	boot    booted
	machine Machine
	network *network.Network
	console *console
	control net.Listener
	tasks   sync.WaitGroup

	// changing is held while the machine is paused, resumed or saved.
	changing sync.Mutex
	paused   bool
	asleep   bool // its memory was saved, and its life is over

	// key is what lets this shim, and nobody else, speak to guestd; savedKey is
	// the SHA-256 of that of the life that this one goes on from, if it does.
	key, savedKey []byte
	// guest is guestd's own connection, once it has said that it is awake.
	guest   atomic.Pointer[wire.Conn]
	sending sync.Mutex
	// booted is the boot that guestd has called from, as it says.
	booted atomic.Pointer[string]
	// rebooted is sent to when the guest has booted anew, lost why the machine
	// can have no guestd any more.
	rebooted chan struct{}
	lost     chan string
	// pressing is set once somebody presses the power button.
	pressing atomic.Bool
	// called is sent to whenever guestd has called, if nobody was told yet.
	called chan struct{}
	// held is sent what guestd says when it is still.
	held chan struct{}
	// slept is sent the file of the key once the memory was saved.
	slept chan string
	// stopped is closed once the life is to end: nothing is saved from then on.
	stopped chan struct{}
	// output are the two streams of what the workload prints.
	output [2]*io.PipeWriter
	// ended is sent what guestd says of the end, once.
	ended chan *guestv1.Ended
	// heard is closed once guestd has nothing more to say.
	heard chan struct{}
}

// begin brings a new life to where its processors run.
func (l *life) begin(newMachine func(context.Context, Config) (Machine, error)) error {
	l.ended, l.slept = make(chan *guestv1.Ended, 1), make(chan string, 1)
	l.rebooted, l.lost = make(chan struct{}, 1), make(chan string, 1)
	l.called, l.held, l.stopped = make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{})
	l.key = make([]byte, keyBytes)
	_, _ = rand.Read(l.key) // never fails, see crypto/rand
	// Names of sockets are relative: paths of any length would not do.
	if err := os.Chdir(l.Box.Dir); err != nil {
		return err
	}
	if found, err := l.Box.Made(&l.plan); err != nil {
		return err
	} else if !found {
		return errors.New("it was deleted")
	}
	if found, err := l.Box.Load(bootRecord, &l.boot); err != nil {
		return err
	} else if !found {
		return errors.New("nothing says what to boot")
	}
	var err error
	if l.console, err = openConsole(l.Box.Path(consoleFile)); err != nil {
		return err
	}
	for i := range l.output {
		reader, writer := io.Pipe()
		l.output[i] = writer
		l.tasks.Go(func() { l.Log.Copy(reader, i == 1) })
	}
	if err := l.powerOn(newMachine); err != nil {
		return err
	}
	if l.control, err = listenControl(); err != nil {
		return err
	}
	l.tasks.Go(l.takeOrders)
	if _, ok := l.machine.(Rebooter); ok {
		l.tasks.Go(l.look)
	}
	return nil
}

// powerOn has the machine go on from what was saved, or boots it, also if the
// former fails: what was saved is tried once.
func (l *life) powerOn(newMachine func(context.Context, Config) (Machine, error)) error {
	key, found := l.takeSaved()
	if found {
		err := l.switchOn(newMachine, l.Box.Path(savedFile), key)
		if err := discardSaved(l.Box); err != nil {
			fmt.Fprintln(os.Stderr, "remove what was restored:", err)
		}
		if err == nil {
			return nil
		}
		fmt.Fprintln(os.Stderr, "what was saved is not restored:", err)
		l.switchOff()
		l.machine, l.network, l.savedKey = nil, nil, nil
	} else if err := discardSaved(l.Box); err != nil {
		return err
	}
	return l.switchOn(newMachine, "", nil)
}

// switchOn makes a machine and starts it. On an error too, switchOff takes back
// what there is of it.
func (l *life) switchOn(newMachine func(context.Context, Config) (Machine, error), state string, key []byte) error {
	l.heard = make(chan struct{})
	close(l.heard)                                   // until there is somebody to listen to
	if err := os.RemoveAll(machineDir); err != nil { // of a life that was killed
		return err
	}
	if err := os.Mkdir(machineDir, 0o700); err != nil {
		return err
	}
	config, err := l.config()
	if err != nil {
		return err
	}
	limit := powerOnLimit
	if state != "" {
		config.Restore, config.RestoreKey, limit = state, key, restoreLimit
	}
	if l.machine, err = newMachine(context.Background(), config); err != nil {
		return err
	}
	calls, err := l.machine.Listen(hostPort)
	if err != nil {
		return err
	}
	l.heard = make(chan struct{})
	go func() {
		defer close(l.heard)
		l.answerGuest(calls)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return l.machine.Start(ctx)
}

// switchOff ends the machine, and returns once nothing of it is left.
func (l *life) switchOff() {
	if l.machine != nil {
		if err := l.machine.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "close the machine:", err)
		}
	}
	if conn := l.guest.Swap(nil); conn != nil {
		conn.Close()
	}
	if l.network != nil {
		_ = l.network.Close()
	}
	if l.heard != nil {
		<-l.heard
	}
	_ = os.RemoveAll(machineDir)
}

// config is what the machine is made of. It opens the network.
func (l *life) config() (Config, error) {
	c := Config{
		Dir: l.Box.Path(machineDir), Arch: l.boot.Arch, CPUs: l.plan.CPUs, MemoryMiB: l.plan.MemoryMiB,
		Kernel: l.boot.Kernel, Vmlinux: l.boot.Vmlinux, Initrd: l.boot.Initrd, Cmdline: l.boot.Cmdline, Console: l.console.theirs,
		ShareUID: l.plan.Owner.UID, ShareGID: l.plan.Owner.GID, Rosetta: l.plan.Image.rosetta(l.boot.Arch),
	}
	if image := l.plan.Image; image != nil {
		c.Disks = []Disk{
			{Serial: imageSerial, Path: image.Root, ReadOnly: true},
			{Serial: layerSerial, Path: l.Box.Path(layerFile)},
		}
	}
	for _, d := range l.plan.Disks {
		if err := d.make(); err != nil {
			return c, err
		}
		c.Disks = append(c.Disks, Disk{Serial: d.Serial, Path: d.Source})
	}
	for _, d := range l.boot.Disks {
		c.Disks = append(c.Disks, Disk{Serial: d.Serial, Path: d.path(l.Box), ReadOnly: !d.Writable})
	}
	for _, s := range l.plan.Shares {
		c.Shares = append(c.Shares, Share{Tag: s.Tag, Path: s.Source, ReadOnly: s.ReadOnly})
	}
	if l.plan.Options.Network == networkNone {
		return c, nil
	}
	c.NAT, c.MAC = l.boot.NAT, l.mac()
	if c.NAT {
		return c, nil
	}
	ours, theirs, err := network.Pair()
	if err != nil {
		return c, err
	}
	c.Network = theirs
	l.network, err = network.Open(network.Config{Link: ours, MAC: c.MAC, Egress: l.plan.Spec.Egress})
	if err != nil {
		theirs.Close()
	}
	return c, err
}

// make makes the image of a disk that has none, or that is to be larger: a hole
// that takes room only as it is filled. Nothing of it is ever taken away.
func (d disk) make() error {
	image, err := os.OpenFile(d.Source, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer image.Close()
	info, err := image.Stat()
	if err != nil {
		return err
	}
	if size := int64(d.SizeMiB) << 20; info.Size() < size { //nolint:gosec // Validated.
		return image.Truncate(size)
	}
	return nil
}

// mac is that of the machine's network device: the same for every machine that
// has a network of its own.
func (l *life) mac() net.HardwareAddr {
	if l.boot.NAT {
		return natMAC(l.Box.Dir)
	}
	return net.HardwareAddr{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee}
}

// supervise stops the machine when asked to, and returns how its life ended
// once it has.
func (l *life) supervise() shim.End {
	var deadline time.Time
	kill, press := idleTimer(), idleTimer()
	detail, killed := "", false
	var stalls <-chan bool
	if machine, ok := l.machine.(Staller); ok {
		stalls = machine.Stalled()
	}
	for {
		select {
		case grace := <-l.Stops:
			switch until := time.Now().Add(grace); {
			case grace <= 0:
				killed = true
				l.kill()
			case l.guest.Load() == nil && l.savedKey == nil:
				// There is nobody yet who would have something to lose.
				l.kill()
				return l.waited(shim.End{ExitCode: 128 + int(sigTerm), Detail: "stopped while it booted"}, deadline)
			default:
				if deadline.IsZero() {
					close(l.stopped)
				}
				if deadline.IsZero() || until.Before(deadline) {
					deadline = until
					kill.Reset(grace)
					press.Reset(grace / 2) // whatever guestd makes of it
				}
				l.ask()
			}
		case <-press.C:
			l.tasks.Go(l.pressPower)
		case <-kill.C:
			detail, killed = "it did not stop within its grace, and was killed", true
			l.kill()
		case ended := <-l.ended:
			return l.waited(endOf(ended), deadline)
		case <-l.called:
			if !deadline.IsZero() {
				l.ask()
			}
		case stalled := <-stalls:
			if stalled {
				l.progress("halted: there is no room on the host's disk for what it writes")
			} else {
				l.progress("")
			}
		case keyFile := <-l.slept:
			select {
			case ended := <-l.ended: // just before it was saved
				_ = discardSaved(l.Box)
				_ = os.Remove(keyFile)
				return l.waited(endOf(ended), deadline)
			default:
			}
			return l.sleep(keyFile)
		case <-l.rebooted:
			return l.cut("the guest restarted")
		case why := <-l.lost:
			return l.cut(why)
		case <-l.machine.Done():
			return l.fell(detail, killed)
		}
	}
}

// release gives back all that the life had, and returns once nothing of it is
// left but records.
func (l *life) release() {
	if l.control != nil {
		l.control.Close()
		_ = os.Remove(controlSocket)
	}
	l.switchOff()
	for _, output := range l.output {
		if output != nil {
			_ = output.Close() // never fails
		}
	}
	l.tasks.Wait()
	// Whoever changes the machine finds it gone, and takes back what it had begun.
	l.changing.Lock()
	l.changing.Unlock() //nolint:staticcheck // Nothing is to be done, but after them.
	if l.console != nil {
		l.console.close()
	}
}
