package process

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/sandbox"
)

// view is how a sandbox's processes see the host: with the folders of the
// left found at the right. There being no mount namespace, it is kept up by
// rewriting whatever begins with one of them.
type view []struct{ target, source string }

func (m made) view() view {
	v := view{{GuestDir, filepath.Join(m.Dir, "guest")}}
	for _, mount := range m.Spec.Mounts {
		v = append(v, struct{ target, source string }{mount.Target, mount.Source})
	}
	// The innermost mount is the one that counts.
	slices.SortStableFunc(v, func(a, b struct{ target, source string }) int {
		return cmp.Compare(len(b.target), len(a.target))
	})
	return v
}

func (v view) host(s string) string {
	for _, m := range v {
		if rest, found := strings.CutPrefix(s, m.target); found && (rest == "" || rest[0] == '/') {
			return m.source + rest
		}
	}
	return s
}

// guestd returns the first process of the sandbox, yet to be started. guest is
// the folder of the guest channel's sockets, open.
func (m made) guestd(secrets string, guest *os.File) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	v := m.view()
	listen := socketPath(guestDescriptor, strconv.Itoa(wire.Port)+".sock")
	args := []string{self, guestdFlag, "--listen", "unix:" + listen, "--secrets-dir", secrets, "--"}
	argv := m.argv()
	if argv[0] == Image {
		args = append(args, Command()...)
	} else {
		args = append(args, v.host(argv[0]))
	}
	for _, arg := range argv[1:] {
		args = append(args, v.host(arg))
	}
	cmd := &exec.Cmd{
		Path:        self,
		Args:        args,
		Env:         baseEnvironment(m.Root),
		Dir:         v.host(cmp.Or(m.Spec.WorkingDir, "/")),
		ExtraFiles:  []*os.File{guest},
		SysProcAttr: confined(),
	}
	for _, name := range slices.Sorted(maps.Keys(m.Spec.Env)) {
		cmd.Env = append(cmd.Env, name+"="+v.host(m.Spec.Env[name]))
	}
	return cmd, nil
}

// argv returns the command line of the workload.
func (m made) argv() []string {
	argv := slices.Clone(m.Spec.Entrypoint)
	if argv == nil {
		argv = []string{m.Spec.Image}
	}
	switch {
	case m.Spec.Command != nil:
		argv = append(argv, m.Spec.Command...)
	case m.Spec.Image == Image && m.Spec.Entrypoint == nil:
		argv = append(argv, "sleep")
	}
	if len(argv) == 0 {
		argv = []string{m.Spec.Image}
	}
	return argv
}

// exitCode is how a process ended, as a shell would say it.
func exitCode(state *os.ProcessState) int {
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return state.ExitCode()
}

// running returns what a running sandbox was made of.
func (d *Driver) running(ctx context.Context, ref sandbox.Ref) (made, error) {
	b, err := d.boxes().Box(ref.ID)
	if err != nil {
		return made{}, err
	}
	o, _, err := b.Settled(ctx)
	if err != nil {
		return made{}, err
	}
	var m made
	found, err := b.Made(&m)
	switch {
	case err != nil:
		return made{}, err
	case o.State == sandbox.StateAbsent || !found:
		return made{}, sandbox.ErrNotFound
	case o.State != sandbox.StateRunning:
		return made{}, fmt.Errorf("%w: it does not run", sandbox.ErrState)
	}
	return m, nil
}

func (d *Driver) dial(ctx context.Context, ref sandbox.Ref, port uint32) (net.Conn, error) {
	m, err := d.running(ctx, ref)
	if err != nil {
		return nil, err
	}
	dir, err := os.Open(filepath.Join(m.Dir, "guest"))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	name := strconv.FormatUint(uint64(port), 10) + ".sock"
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", socketPath(int(dir.Fd()), name))
		// Linux has no way to wait for room among those that wait to be
		// accepted but to try again: connect(2), EAGAIN.
		if !errors.Is(err, syscall.EAGAIN) {
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
				err = fmt.Errorf("%w: nothing listens there", sandbox.ErrUnavailable)
			}
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}
