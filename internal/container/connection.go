package container

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/containers/podman/v5/pkg/bindings"

	"github.com/choiros/agent/internal/sandbox"
)

// How long Podman may take over an answer. Past it the call fails: a Podman
// that hangs must not hang the agent.
const (
	readLimit   = 30 * time.Second
	removeLimit = 3 * time.Minute
	startLimit  = 3 * time.Minute
	// The first container of an image for a user that is not root has the
	// image's files copied for it.
	createLimit = 15 * time.Minute
	imageLimit  = 2 * time.Hour
)

// minVersion is the oldest Podman that this package is written for. It is the
// first to have pasta as the rootless network and to know --map-guest-addr.
const minMajor = 5

// A connection is what the bindings need to reach one Podman service. It holds
// no open socket: each call has its own, so that a service that was restarted,
// or that systemd starts on demand and ends when idle, makes no difference.
type connection struct {
	socket string
	// sees says that pids which Podman tells are of this host and namespace.
	sees bool
	// values is the context that bindings.NewConnection returned. The bindings
	// look their client up in it. It never ends.
	values context.Context
}

// connect returns the connection to use, making one if there is none.
func (d *Driver) connect(ctx context.Context) (*connection, error) {
	if c := d.conn.Load(); c != nil {
		return c, nil
	}
	c, err := d.dialService(ctx)
	if err != nil {
		return nil, err
	}
	d.conn.Store(c)
	return c, nil
}

// dialService finds Podman's socket and sees that a rootless Podman of the
// right version answers there.
func (d *Driver) dialService(ctx context.Context) (*connection, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, readLimit, errSilent)
	defer cancel()
	socket, sees, err := d.findSocket(ctx)
	if err != nil {
		return nil, ended(ctx, err)
	}
	values, err := bindings.NewConnection(onlyEnd{ctx}, "unix://"+socket)
	if err != nil {
		// The socket accepts connections, but what is behind it is no Podman,
		// or one older than the bindings know.
		return nil, ended(ctx, &sandbox.UnavailableError{
			Err:  fmt.Errorf("podman at %s: %w", socket, err),
			Cure: upgradeCure,
		})
	}
	client, err := bindings.GetClient(values)
	if err != nil {
		return nil, err
	}
	if v := bindings.ServiceVersion(values); v.Major < minMajor {
		return nil, &sandbox.UnavailableError{
			Err:  fmt.Errorf("podman at %s is version %s; %d.0 or newer is needed", socket, v, minMajor),
			Cure: upgradeCure,
		}
	}
	client.Client.Transport = newTransport(socket)
	return &connection{socket: socket, sees: sees, values: values}, nil
}

// findSocket returns the first socket that accepts a connection. If none
// does, the error is about the one that is most likely meant.
func (d *Driver) findSocket(ctx context.Context) (socket string, sees bool, err error) {
	candidates := socketCandidates(d.cfg, d.uid)
	if len(candidates) == 0 {
		return "", false, &sandbox.UnavailableError{
			Err:  errors.New("no podman socket is configured"),
			Cure: "podman machine init && podman machine start, then set the socket's path in the agent's configuration",
		}
	}
	var first error
	for _, socket := range candidates {
		sees, err := trySocket(ctx, socket, d.uid)
		if err == nil {
			return socket, sees, nil
		}
		// Of a missing and a forbidden one, the forbidden one tells more.
		if first == nil || errors.Is(first, os.ErrNotExist) && !errors.Is(err, os.ErrNotExist) {
			first = err
		}
	}
	return "", false, first
}

// socketCandidates are the places where the socket is looked for.
func socketCandidates(cfg Config, uid int) []string {
	if cfg.Socket != "" {
		return []string{strings.TrimPrefix(cfg.Socket, "unix://")}
	}
	var found []string
	if cfg.RuntimeDir != "" {
		found = append(found, filepath.Join(cfg.RuntimeDir, "podman", "podman.sock"))
	}
	if runtime.GOOS == "linux" {
		usual := filepath.Join("/run/user", strconv.Itoa(uid), "podman", "podman.sock")
		if len(found) == 0 || found[0] != usual {
			found = append(found, usual)
		}
	}
	return found
}

// trySocket sees that somebody listens at a socket and that it is this user's.
func trySocket(ctx context.Context, socket string, uid int) (sees bool, err error) {
	if err := checkSocketOwner(socket, uid); err != nil {
		return false, err
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return false, socketError(socket, err)
	}
	sees = seesPodman(conn)
	return sees, conn.Close()
}

// call makes one call of the bindings. fn gets a context that ends with ctx or
// after limit and that the bindings find their connection in. The error is
// already translated.
func (d *Driver) call(ctx context.Context, limit time.Duration, fn func(ctx context.Context) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c, err := d.connect(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errSilent)
	defer cancel()
	failed := new(failure)
	err = fn(callContext{Context: ctx, values: c.values, failed: failed})
	if failed.err != nil {
		// Whatever made the socket unusable, look for it anew next time.
		d.conn.CompareAndSwap(c, nil)
		err = transportError(c.socket, failed.err)
	} else {
		err = translate(err)
	}
	return ended(ctx, err)
}

// settle makes a call that changes something. It does not end with ctx: what
// Podman has begun is finished, for a half is what nobody could find again.
// When ctx ends, the call gets a little longer, in which nearly every one
// finishes; then settle returns and leaves it to finish by itself.
func (d *Driver) settle(ctx context.Context, limit time.Duration, fn func(ctx context.Context) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	done := make(chan error, 1)
	d.background.Go(func() { done <- d.call(context.WithoutCancel(ctx), limit, fn) })
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	timer := time.NewTimer(settleTime)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return ctx.Err()
	}
}

// settleTime is how long a call that changes something may outlast its context.
const settleTime = 2 * time.Second

// callContext is a caller's context in which the bindings find their
// connection.
type callContext struct {
	context.Context
	values context.Context
	failed *failure
}

// failure is what kept a request from being answered; see transport.
type failure struct{ err error }

type failureKey struct{}

func (c callContext) Value(key any) any {
	if key == (failureKey{}) {
		return c.failed
	}
	if v := c.values.Value(key); v != nil {
		return v
	}
	return c.Context.Value(key)
}

// onlyEnd is a context's end without its values. What is derived from it may
// be kept for its values after the end.
type onlyEnd struct{ context.Context }

func (onlyEnd) Value(any) any { return nil }

// transport keeps the bindings from repeating requests. Their DoRequest sends
// one that failed up to three times, sleeping meanwhile, whether or not its
// context has ended, its body is used up, or it had an effect already. So a
// failure is noted for Driver.call, and the bindings get an answer that they
// do not try to improve upon.
type transport struct{ base http.RoundTripper }

func newTransport(socket string) transport {
	return transport{&http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
		DisableCompression: true,
		// A kept connection to a service that has ended since would fail the
		// next POST. To dial a unix socket takes some 50 µs.
		DisableKeepAlives: true,
	}}
}

// statusNoAnswer is no status of HTTP's.
const statusNoAnswer = 599

func (t transport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.base.RoundTrip(req)
	if err == nil {
		return resp, nil
	}
	failed, ok := req.Context().Value(failureKey{}).(*failure)
	if !ok {
		return nil, err
	}
	failed.err = err
	return &http.Response{
		Status: "599 no answer", StatusCode: statusNoAnswer,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{}, Body: io.NopCloser(strings.NewReader("")), Request: req,
	}, nil
}
