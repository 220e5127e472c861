// Package container is the driver that runs sandboxes as rootless Podman
// containers, over Podman's own API and Go bindings.
//
// Podman owns the containers: conmon keeps each alive and records how it
// ended, so nothing here needs to survive. A sandbox is found again by its
// container's name, choiros-<owner>-<id>, and by two labels that say the same;
// a container that has the name without the labels is not ours and is left
// alone. What belongs to the sandbox on the host lies in Ref.Dir: guest, the
// folder of the guest channel's sockets, and hosts, its /etc/hosts.
//
// The first process of every container is guestd, from a folder of the host
// that is mounted read-only; what the spec or the image name as their command
// is for it to start. On guestd's own port Dial takes nobody for it but the
// container's first process.
//
// What it refuses to do:
//
//   - Run anything as root: a Podman that is not rootless is unavailable.
//   - Start Podman, or pull an image that was not asked for.
//   - Give a container privileges: no new ones, none of the host's devices,
//     namespaces and users, all capabilities dropped but those that the spec
//     adds by name, of which those that open the host are refused; seccomp,
//     masked paths and read-only system paths stay as Podman has them.
//   - Mount a folder that holds Podman's socket, that a symbolic link has
//     replaced since, or over what makes a sandbox one (/etc, /run).
//   - Publish ports: what a sandbox serves is reached over the guest channel.
//   - Accept a limit that this host would not enforce.
//
// Ownership: the user the workload runs as (the spec's, else the image's) is
// the host's user who runs the agent, whatever its number inside. So data that
// a sandbox writes belongs to that user outside, and what that user owns can be
// written inside. Everyone else inside is one of that user's subordinate ids.
//
// Network: each sandbox has a pasta(1) of its own, and with it the host's way
// out to the internet over IPv4. The host's loopback, its own main address and
// other sandboxes are not to be reached. What pasta cannot keep a sandbox from
// is everything else that the host itself can reach: its neighbours, a cloud's
// metadata service, and services that the host offers on further addresses of
// its own. That is for the host's firewall, which can tell sandboxes by the
// user (nftables: meta skuid).
package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/choiros/agent/internal/sandbox"
)

// The labels that make a container ours, and say whose sandbox it is.
const (
	labelOwner   = "choiros.agent.owner"
	labelSandbox = "choiros.agent.sandbox"
)

// Where a sandbox finds what the driver puts into it.
const (
	guestTarget   = "/run/choiros" // the folder of its guest channel
	guestdTarget  = "/run/guestd"  // the folder with guestd
	secretsTarget = "/run/secrets" // a tmpfs for those secrets that are files
)

// Config is what a Driver is made of.
type Config struct {
	// Socket is the path of Podman's API socket. Empty: the user's own, below
	// RuntimeDir or /run/user/<uid>.
	Socket string
	// RuntimeDir is the user's XDG_RUNTIME_DIR; may be empty.
	RuntimeDir string
	// Owner tells this agent's sandboxes from those of others on the same
	// Podman: eight lower-case hexadecimal digits.
	Owner string
	// GuestdDir is the absolute path of a folder of the host, open to
	// everybody, that holds the static program guestd and is mounted in every
	// sandbox. Replacing the file by a rename gives each container the new one
	// at its next start.
	GuestdDir string
}

// Driver is a sandbox.Driver. It is also a Validator, LogSource, Resizer and
// ImageStore. The zero Driver is of no use: see New.
type Driver struct {
	cfg      Config
	uid      int                        // this user's
	conn     atomic.Pointer[connection] // the last that worked, or nil
	host     atomic.Pointer[hostFacts]  // what Podman last told of the host, or nil
	accounts accountCache
	own      func() ([]int, error) // this process's numbers in its pid namespaces
	ends     endWatcher

	// background are the calls that go on after their caller has left.
	background sync.WaitGroup
}

var ownerPattern = regexp.MustCompile(`^[0-9a-f]{8}$`)

// New returns a Driver. It does no I/O: whether Podman is there shows when it
// is first asked for something.
func New(cfg Config) (*Driver, error) {
	if !ownerPattern.MatchString(cfg.Owner) {
		return nil, fmt.Errorf("owner %q is not eight hexadecimal digits", cfg.Owner)
	}
	d := &Driver{cfg: cfg, uid: os.Getuid(), own: sync.OnceValues(ownNumbers)}
	d.ends.init(d)
	return d, nil
}

// Close ends what the driver runs in the background. Sandboxes run on. Calls
// that wait for a sandbox to end return with an error.
func (d *Driver) Close() error {
	d.ends.close()
	d.background.Wait()
	return nil
}

// prefix begins the names of all our containers.
func (d *Driver) prefix() string { return "choiros-" + d.cfg.Owner + "-" }

// name is the name of a sandbox's container.
func (d *Driver) name(id string) string { return d.prefix() + id }

// lookupMark is in the names of the containers in which a sandbox's image is
// read before its own can be made; see Driver.account. No id has a dot.
const lookupMark = ".lookup-"

// sandboxOf returns whose container a name is, if it is one that we give, and
// whether it is one of those in which images are read.
func (d *Driver) sandboxOf(name string) (id string, lookup, ok bool) {
	rest, found := strings.CutPrefix(name, d.prefix())
	id, _, lookup = strings.Cut(rest, lookupMark)
	return id, lookup, found && sandbox.ValidateName("id", id) == nil
}

// ours reports whether a container of this name and labels is one of ours,
// and of which sandbox.
func (d *Driver) ours(name string, labels map[string]string) (id string, lookup, ok bool) {
	id, lookup, ok = d.sandboxOf(name)
	return id, lookup, ok && labels[labelOwner] == d.cfg.Owner && labels[labelSandbox] == id
}

// op adds to an error which operation on which sandbox it comes from. The
// context's own errors stay as they are.
func op(what, id string, err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%s %s: %w", what, id, err)
}

var (
	_ sandbox.Driver     = (*Driver)(nil)
	_ sandbox.Validator  = (*Driver)(nil)
	_ sandbox.LogSource  = (*Driver)(nil)
	_ sandbox.Resizer    = (*Driver)(nil)
	_ sandbox.ImageStore = (*Driver)(nil)
)
