//go:build linux

package guestd

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/guest/machine"
	"github.com/choiros/agent/internal/version"
)

const (
	defaultListen     = "unix:/run/choiros/1024.sock"
	defaultVsock      = "vsock:1024"
	defaultSecretsDir = "/run/secrets"

	// What exits of shells mean, and guestd's are like them.
	exitFault      = 125
	exitDenied     = 126
	exitNotFound   = 127
	exitSignalBase = 128
)

// Who may speak to guestd over a unix socket.
const (
	trustAnyone  = "anyone"  // who can reach the socket
	trustOutside = "outside" // who is in no process namespace of the sandbox's
)

// options is the command line.
type options struct {
	listen     string
	secretsDir string
	trust      string
	command    []string
	version    bool
	// machine: guestd is to make the virtual machine that it is in.
	machine bool
}

// initName is what the kernel calls the init of an initramfs. As process 1 of
// that name guestd is in a machine of its own.
const initName = "/init"

// Run is guestd: args are those after its name, "--" and the default command
// last. It returns the status to exit with, which is the workload's, and the
// process is to exit then: what served connections is left as it is.
func Run(args []string, stdout, stderr io.Writer) int {
	first := os.Getpid() == 1
	if first && os.Args[0] == initName {
		args = []string{"--machine"} // the kernel's own are for others
	}
	o, err := parse(args, first, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "guestd: %v\n", err)
		return exitFault
	case o.version:
		fmt.Fprintln(stdout, version.String())
		return 0
	}
	code, err := run(o, first)
	if err != nil {
		fmt.Fprintf(stderr, "guestd: %v\n", err)
	}
	return code
}

func parse(args []string, first bool, stderr io.Writer) (options, error) {
	var o options
	flags := flag.NewFlagSet("guestd", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.listen, "listen", "", "unix:PATH or vsock:PORT (default "+defaultListen+", or "+defaultVsock+" with --machine)")
	flags.StringVar(&o.secretsDir, "secrets-dir", defaultSecretsDir, "a tmpfs for the secrets that are files")
	flags.StringVar(&o.trust, "trust", "", "who may connect to a unix socket: outside (no process of the sandbox; the default for process 1) or anyone")
	flags.BoolVar(&o.machine, "machine", false, "ask the host over vsock what the virtual machine is to become; as process 1, make its root, too")
	flags.BoolVar(&o.version, "version", false, "print the version")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			flags.SetOutput(stderr)
			flags.Usage()
		}
		return options{}, err
	}
	o.command = flags.Args()
	if o.listen == "" {
		o.listen = defaultListen
		if o.machine {
			o.listen = defaultVsock
		}
	}
	switch o.trust {
	case "":
		o.trust = trustAnyone
		if first {
			o.trust = trustOutside
		}
	case trustAnyone, trustOutside:
	default:
		return options{}, fmt.Errorf("--trust %s: outside or anyone", o.trust)
	}
	return o, nil
}

// run serves until the workload has ended. An error is why there is, or will
// be, no workload.
func run(o options, first bool) (int, error) {
	beSmall()
	if err := protect(first); err != nil {
		return exitFault, err
	}
	signals := make(chan os.Signal, 64)
	// Never undone: to give the signals their default action back would let
	// one that comes between run's end and the process's replace the
	// workload's exit code with its own.
	signal.Notify(signals, forwarded()...)

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if o.machine {
		return runMachine(ctx, o, first, signals)
	}
	kills := oomKills()
	if first {
		_ = os.Remove(oomFile(o.listen)) // of a past life
	}
	s := newServer(o, first)
	if err := s.open(ctx, o); err != nil {
		return exitFault, err
	}
	for {
		select {
		case e := <-s.workload.ended:
			if e.err == nil {
				s.workload.awaitAnswer()
			}
			if !first {
				s.children.killAll()
			} else if e.code == exitSignalBase+int(unix.SIGKILL) && oomKills() > kills {
				_ = os.WriteFile(oomFile(o.listen), nil, 0o644) // else Podman may still know
			}
			return e.code, e.err
		case sig := <-signals:
			number, _ := sig.(syscall.Signal)
			if !s.workload.signal(number) && ends(number) {
				return exitSignalBase + int(number), nil
			}
		}
	}
}

// oomFile is what guestd leaves beside its socket if the workload was killed for
// want of memory. A container's monitor (conmon) learns of that from a file that
// goes with the container's last process, so that Podman may know nothing of it.
func oomFile(listen string) string {
	return filepath.Join(filepath.Dir(strings.TrimPrefix(listen, "unix:")), "oom")
}

// oomKills is how many processes of the container the kernel has killed for
// want of memory; 0 where that cannot be told.
func oomKills() uint64 {
	text, err := os.ReadFile("/sys/fs/cgroup/memory.events")
	if err != nil {
		return 0
	}
	return machine.ParseOOMKills(string(text))
}

// open listens, and serves until ctx ends.
func (s *server) open(ctx context.Context, o options) error {
	listener, err := listen(o.listen, o.trust)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { listener.Close() })
	go s.children.reap(ctx)
	go s.serve(ctx, listener)
	return nil
}

// protect keeps what guestd knows from the other processes of the sandbox, and
// from its host's core dumps. It lasts for all that is started from here.
func protect(first bool) error {
	// The workload's memory holds secrets, too, so it inherits this.
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switch core dumps off: %w", err)
	}
	// See ptrace(2): no process without CAP_SYS_PTRACE may look into one that
	// is not dumpable, be it the same user's. execve sets it again.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("protect its memory: %w", err)
	}
	if first {
		return nil
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the reaper: %w", err)
	}
	return nil
}

// beSmall trades speed of the garbage collector for memory: guestd is in every
// sandbox, and has little garbage.
func beSmall() {
	debug.SetGCPercent(50)
	runtime.GOMAXPROCS(min(4, runtime.GOMAXPROCS(0)))
}

// forwarded are the signals that the workload is to get: all that a process
// can be sent from outside, but for those that tell guestd of its own faults,
// its children, its terminal's jobs, and SIGURG, which Go's runtime uses.
func forwarded() []os.Signal {
	signals := []os.Signal{
		unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGTERM,
		unix.SIGCONT, unix.SIGXCPU, unix.SIGVTALRM, unix.SIGWINCH, unix.SIGIO, unix.SIGPWR,
	}
	// Those below are the C library's own. An image with systemd in it is
	// stopped with SIGRTMIN+3.
	for number := syscall.Signal(35); number <= maxSignal; number++ {
		signals = append(signals, number)
	}
	return signals
}

// maxSignal is the last of the real-time signals.
const maxSignal = 64

// ends reports whether a signal ends guestd while there is no workload to
// decide that.
func ends(number syscall.Signal) bool {
	switch number {
	case unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGKILL:
		return true
	}
	return number == 37 // SIGRTMIN+3, which stops an image with systemd in it
}
