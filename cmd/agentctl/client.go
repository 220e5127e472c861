package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/location"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/version"
)

const (
	// readTimeout bounds a call that the agent answers from memory.
	readTimeout = 30 * time.Second
	// reconnectTimeout is how long a call waits for an agent that went away
	// while it was being answered: long enough for a restart.
	reconnectTimeout = 10 * time.Second
	// maxMessage allows for the longest page of a list.
	maxMessage = 64 << 20
)

// client is a connection to an agent.
type client struct {
	sandboxes agentv1.SandboxServiceClient
	images    agentv1.ImageServiceClient
	host      agentv1.HostServiceClient
	execs     agentv1.ExecServiceClient
	files     agentv1.FileServiceClient
	ports     agentv1.PortServiceClient
	secrets   agentv1.SecretServiceClient
	stats     agentv1.StatsServiceClient

	address address
	conn    *grpc.ClientConn
	link    *link
}

// client returns the connection, opening it at the first call. Opening does
// not connect; the first call over it does.
func (a *app) client() (*client, error) {
	if a.conn != nil {
		return a.conn, nil
	}
	addr, err := a.agentAddress()
	if err != nil {
		return nil, err
	}
	files := a.tls.or(tlsFiles{a.getenv("CHOIROS_AGENT_TLS_CERT"), a.getenv("CHOIROS_AGENT_TLS_KEY"), a.getenv("CHOIROS_AGENT_TLS_CA")})
	c, err := dial(addr, files, a.notef)
	if err != nil {
		return nil, err
	}
	a.conn = c
	return c, nil
}

func (c *client) close() { _ = c.conn.Close() } // nothing is buffered in it

// address is where an agent listens.
type address struct{ network, location string } // "unix" or "tcp"

func (a address) String() string {
	if a.network == "unix" {
		return "unix://" + a.location
	}
	return a.location
}

// agentAddress is that of --agent, of CHOIROS_AGENT, or the default.
func (a *app) agentAddress() (address, error) {
	if addr, asked, err := a.askedAddress(); asked || err != nil {
		return addr, err
	}
	path := location.On(a.on.goos, a.getenv, a.on.uid).Socket
	return address{"unix", path}, a.ownFolder(filepath.Dir(path))
}

// ownFolder refuses a folder of somebody else's where the default socket is to
// be: on a Mac it may be below /tmp, where anybody can be first. Of root's
// agent the folder is whose the agent is.
func (a *app) ownFolder(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil || a.on.uid == 0 {
		return nil //nolint:nilerr // Nobody's yet, or to be told by the dial.
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || stat.Uid == 0 || int(stat.Uid) == os.Getuid() {
		return nil
	}
	return withHint(fmt.Errorf("%s belongs to %s: %w", dir, userName(int(stat.Uid)), sandbox.ErrDenied),
		"have it removed, or name your agent's socket with --agent unix:///PATH")
}

// askedAddress is that of --agent or of CHOIROS_AGENT, if there is one.
func (a *app) askedAddress() (addr address, asked bool, err error) {
	for _, from := range []struct{ name, value string }{
		{"--agent", a.address}, {"CHOIROS_AGENT", a.getenv("CHOIROS_AGENT")},
	} {
		if from.value == "" {
			continue
		}
		addr, err := parseAddress(from.value)
		if err != nil {
			return address{}, false, &sandbox.FieldError{Field: from.name, Problem: err.Error()}
		}
		return addr, true, nil
	}
	return address{}, false, nil
}

func parseAddress(s string) (address, error) {
	path, isUnix := strings.CutPrefix(s, "unix://")
	if !isUnix {
		path, isUnix = s, strings.HasPrefix(s, "/")
	}
	if isUnix {
		if !filepath.IsAbs(path) {
			return address{}, fmt.Errorf("%q is not absolute; write unix:///path/to/agent.sock", s)
		}
		return address{"unix", path}, nil
	}
	host, port, err := net.SplitHostPort(s)
	if err == nil {
		_, err = parsePortNumber(port, 1)
	}
	if err != nil || host == "" {
		return address{}, fmt.Errorf("%q is neither unix:///path nor host:port", s)
	}
	return address{"tcp", s}, nil
}

// tlsFiles are what a connection over TCP needs; PEM.
type tlsFiles struct{ cert, key, ca string }

func (f tlsFiles) or(other tlsFiles) tlsFiles {
	if f == (tlsFiles{}) {
		return other
	}
	return f
}

func (f tlsFiles) config(host string) (*tls.Config, error) {
	for _, file := range []struct{ flag, path string }{{"--tls-cert", f.cert}, {"--tls-key", f.key}, {"--tls-ca", f.ca}} {
		if file.path == "" {
			return nil, sandbox.Invalidf(file.flag, "is missing: an agent is reached over TCP with mutual TLS only; give --tls-cert, --tls-key and --tls-ca")
		}
	}
	pair, err := tls.LoadX509KeyPair(f.cert, f.key)
	if err != nil {
		return nil, sandbox.Invalidf("--tls-cert", "%s", err)
	}
	pem, err := os.ReadFile(f.ca)
	if err != nil {
		return nil, sandbox.Invalidf("--tls-ca", "%s", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, sandbox.Invalidf("--tls-ca", "%s holds no certificate", f.ca)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{pair}, RootCAs: roots, ServerName: host, MinVersion: tls.VersionTLS13,
	}, nil
}

func dial(addr address, files tlsFiles, notef func(string, ...any)) (*client, error) {
	l := &link{address: addr, notef: notef}
	creds, authority := insecure.NewCredentials(), "localhost"
	if addr.network == "tcp" {
		host, _, err := net.SplitHostPort(addr.location)
		if err != nil {
			return nil, err
		}
		config, err := files.config(host)
		if err != nil {
			return nil, err
		}
		creds, authority = &handshake{credentials.NewTLS(config), l}, host
	}
	conn, err := grpc.NewClient("passthrough:///agent",
		grpc.WithTransportCredentials(creds),
		grpc.WithAuthority(authority),
		grpc.WithUserAgent("agentctl/"+version.String()),
		grpc.WithContextDialer(l.dial),
		grpc.WithUnaryInterceptor(l.unary),
		grpc.WithStatsHandler(l),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}))
	if err != nil {
		return nil, fmt.Errorf("agent address %s: %w", addr, err)
	}
	return &client{
		sandboxes: agentv1.NewSandboxServiceClient(conn),
		images:    agentv1.NewImageServiceClient(conn),
		host:      agentv1.NewHostServiceClient(conn),
		execs:     agentv1.NewExecServiceClient(conn),
		files:     agentv1.NewFileServiceClient(conn),
		ports:     agentv1.NewPortServiceClient(conn),
		secrets:   agentv1.NewSecretServiceClient(conn),
		stats:     agentv1.NewStatsServiceClient(conn),
		address:   addr, conn: conn, link: l,
	}, nil
}

// link knows how the connection fares, which gRPC does not tell its callers.
type link struct {
	address address
	notef   func(string, ...any)

	mu        sync.Mutex
	connected bool  // a request has been sent over it
	err       error // of the last attempt to connect
}

// HandleRPC notes that a request was sent: only then was there a connection
// that can have dropped. With TLS 1.3 a client learns that it is refused only
// after its handshake.
func (l *link) HandleRPC(_ context.Context, event stats.RPCStats) {
	if _, sent := event.(*stats.OutHeader); sent {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.connected = true
	}
}

// TagRPC, TagConn and HandleConn complete stats.Handler.
func (l *link) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

// TagConn does nothing.
func (l *link) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn does nothing.
func (l *link) HandleConn(context.Context, stats.ConnStats) {}

func (l *link) dial(ctx context.Context, _ string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, l.address.network, l.address.location)
	l.tried(err)
	return conn, err
}

func (l *link) tried(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
}

func (l *link) state() (connected bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.connected, l.err
}

// handshake tells the link why a TLS handshake failed.
type handshake struct {
	credentials.TransportCredentials
	link *link
}

func (h *handshake) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := h.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		h.link.tried(err)
	}
	return conn, info, err
}

func (h *handshake) Clone() credentials.TransportCredentials {
	return &handshake{h.TransportCredentials.Clone(), h.link}
}

// unary retries a call whose connection dropped, once: every call here either
// changes nothing or carries a request id, under which the agent does a thing
// once and answers as often as it is asked.
func (l *link) unary(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoke(ctx, method, req, reply, conn, opts...)
	if connected, _ := l.state(); !lost(err) || !connected || ctx.Err() != nil {
		return l.explain(ctx, err)
	}
	l.notef("the connection to the agent was lost; trying once more")
	again, cancel := context.WithTimeout(ctx, reconnectTimeout)
	defer cancel()
	err = invoke(again, method, req, reply, conn, append(opts, grpc.WaitForReady(true))...)
	if again.Err() != nil && ctx.Err() == nil {
		_, cause := l.state()
		return &connectError{l.address, cmp.Or(cause, context.Cause(again))}
	}
	return l.explain(ctx, err)
}

// lost reports whether a call failed for want of a connection, or because the
// agent is going away, in contrast to one that the agent answered with an
// error of its own: those carry another reason.
func lost(err error) bool {
	info := errorInfo(err)
	return status.Code(err) == codes.Unavailable && (info == nil || info.GetReason() == "AGENT_STOPPING")
}

// explain turns gRPC's error for a connection that cannot be made into a
// *connectError, and that for a context that ended into the context's cause;
// others it returns as they are.
func (l *link) explain(ctx context.Context, err error) error {
	if code := status.Code(err); code == codes.DeadlineExceeded || code == codes.Canceled {
		return ended(ctx, err)
	}
	if !lost(err) {
		return err
	}
	if _, cause := l.state(); cause != nil {
		return &connectError{l.address, cause}
	}
	return &connectError{l.address, errors.New(status.Convert(err).Message())}
}

// ended returns the cause of ctx's end, if that is what err is about.
func ended(ctx context.Context, err error) error {
	switch reasonOf(err) {
	case "", "CANCELLED", "DEADLINE_EXCEEDED":
	default:
		return err
	}
	// The agent, which counts the same deadline down, may be a little ahead.
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < time.Second {
		<-ctx.Done()
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// connectError is an agent that cannot be reached. It wraps ErrUnavailable.
type connectError struct {
	address address
	err     error
}

func (e *connectError) Error() string {
	return fmt.Sprintf("cannot reach the agent at %s: %s", e.address, e.problem())
}

func (e *connectError) Unwrap() []error { return []error{sandbox.ErrUnavailable, e.err} }

// problem is the cause without what the address already says.
func (e *connectError) problem() string {
	if e.address.network == "unix" {
		switch {
		case errors.Is(e.err, os.ErrNotExist):
			return "it is not running (there is no such socket)"
		case errors.Is(e.err, errConnectionRefused):
			return "it is not running (nobody listens on the socket)"
		case errors.Is(e.err, os.ErrPermission):
			return "you may not use the socket"
		}
	}
	if op := (*net.OpError)(nil); errors.As(e.err, &op) && op.Err != nil {
		return op.Err.Error()
	}
	return e.err.Error()
}

// quick returns a context for a call that is answered from memory.
func quick(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, readTimeout, gaveUp{readTimeout})
}

// requestID returns a fresh random one, a version 4 UUID (RFC 9562).
func requestID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
