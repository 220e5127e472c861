// Package guest is the agent's side of the guest channel: it speaks to guestd,
// the one process of ours inside every sandbox, in the protocol of
// api/choiros/guest/v1.
//
// It does not trust what answers. Every answer has a deadline and a bound on
// its size; text from inside is stripped of control characters and clipped; a
// descriptor is taken only if it is the socket that was asked for. A guest that
// lies, floods or is silent costs the agent one connection and at most
// wire.MaxFromGuest bytes for each call it is asked, and gives an error that
// wraps sandbox.ErrGuest.
//
// The package refuses to keep connections or state: a call is a connection, and
// a Guest is no more than a way to dial.
package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
	"unicode"

	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/sandbox"
)

// Port is where guestd listens on the guest channel.
const Port = wire.Port

const (
	// answerLimit is how long a guest may take to answer a request whose
	// answer needs no work.
	answerLimit = 20 * time.Second
	// maxText is how much is kept of what a guest says for people, in bytes.
	maxText = 1 << 10
)

// Guest is the way to one sandbox's guestd.
type Guest struct {
	name string
	dial func(ctx context.Context) (net.Conn, error)
}

// New returns the guest of a sandbox; dial opens a connection to Port.
func New(name string, dial func(ctx context.Context) (net.Conn, error)) *Guest {
	return &Guest{name: name, dial: dial}
}

// Info is who is inside.
type Info struct {
	Version string // guestd's own
	Phase   Phase
	// Generation is that of the Configuration that was obeyed.
	Generation uint64
	Calls      []string // that it knows
}

// Phase is how far a life of a sandbox is, as guestd sees it.
type Phase int

// The phases.
const (
	PhaseUnknown Phase = iota
	PhaseWaiting       // for Configure
	PhaseRunning
	PhaseEnding
)

// Secret is one value for a sandbox. It is only ever held in passing.
type Secret struct {
	Name  string
	Value []byte
	File  bool
}

// Configuration is what a workload needs to start.
type Configuration struct {
	Generation uint64
	Hostname   string
	Secrets    []Secret
	Entropy    []byte
}

// Hello asks who is there.
func (g *Guest) Hello(ctx context.Context) (Info, error) {
	resp, err := g.ask(ctx, "greet", &guestv1.Request{Call: &guestv1.Request_Hello{Hello: &guestv1.Hello{}}})
	if err != nil {
		return Info{}, err
	}
	greeting := resp.GetGreeting()
	if greeting == nil {
		return Info{}, g.odd("greet", "no greeting")
	}
	info := Info{Version: text(greeting.GetVersion()), Generation: greeting.GetGeneration(), Calls: greeting.GetCalls()}
	switch greeting.GetPhase() {
	case guestv1.Greeting_PHASE_WAITING:
		info.Phase = PhaseWaiting
	case guestv1.Greeting_PHASE_RUNNING:
		info.Phase = PhaseRunning
	case guestv1.Greeting_PHASE_ENDING:
		info.Phase = PhaseEnding
	case guestv1.Greeting_PHASE_UNSPECIFIED:
	}
	return info, nil
}

// Configure delivers what the workload needs and starts it. Once it has, doing
// it again for the same generation succeeds and does nothing.
func (g *Guest) Configure(ctx context.Context, c Configuration) error {
	_, err := g.ask(ctx, "configure", &guestv1.Request{Call: &guestv1.Request_Configure{Configure: &guestv1.Configure{
		Generation: c.Generation, Hostname: c.Hostname, Secrets: secretsToWire(c.Secrets),
		Entropy: c.Entropy, Time: timestamppb.Now(),
	}}})
	return err
}

// Rejoin tells the guest of a machine whose memory was restored which boot this
// is now. The workload runs on; of one that does not run: an error that wraps
// sandbox.ErrState.
func (g *Guest) Rejoin(ctx context.Context, generation uint64, entropy []byte) error {
	_, err := g.ask(ctx, "rejoin", &guestv1.Request{Call: &guestv1.Request_Rejoin{Rejoin: &guestv1.Rejoin{
		Generation: generation, Entropy: entropy, Time: timestamppb.Now(),
	}}})
	return err
}

// UpdateSecrets replaces secrets and returns, once guestd has acknowledged it,
// the names of those whose values are new. If there are any, or always is set,
// the workload is sent the signal, unless that is zero.
func (g *Guest) UpdateSecrets(ctx context.Context, secrets []Secret, signal int32, always bool) (changed []string, err error) {
	response, err := g.ask(ctx, "give secrets to", &guestv1.Request{Call: &guestv1.Request_UpdateSecrets{
		UpdateSecrets: &guestv1.UpdateSecrets{Secrets: secretsToWire(secrets), Signal: signal, AlwaysSignal: always},
	}})
	if err != nil {
		return nil, err
	}
	for _, name := range response.GetSecretsUpdated().GetChanged() {
		changed = append(changed, text(name))
	}
	return changed, nil
}

func secretsToWire(secrets []Secret) []*guestv1.Secret {
	var w []*guestv1.Secret
	for _, s := range secrets {
		w = append(w, &guestv1.Secret{Name: s.Name, Value: s.Value, File: s.File})
	}
	return w
}

// AwaitReady returns once a readiness probe has succeeded inside. note is
// called, from this goroutine, with what each probe says that says something
// new.
func (g *Guest) AwaitReady(ctx context.Context, readiness sandbox.Readiness, note func(string)) error {
	const op = "probe"
	call := &guestv1.AwaitReady{IntervalMillis: uint32(readiness.ProbeInterval().Milliseconds())} //nolint:gosec // At most a minute.
	switch {
	case readiness.HTTP != nil:
		call.Probe = &guestv1.AwaitReady_Http{Http: &guestv1.HttpProbe{Port: uint32(readiness.HTTP.Port), Path: readiness.HTTP.Path}}
	case readiness.TCPPort != 0:
		call.Probe = &guestv1.AwaitReady_Tcp{Tcp: &guestv1.TcpProbe{Port: uint32(readiness.TCPPort)}}
	case len(readiness.Exec) > 0:
		call.Probe = &guestv1.AwaitReady_Exec{Exec: &guestv1.ExecProbe{Command: readiness.Exec}}
	}
	conn, _, err := g.open(ctx, op, &guestv1.Request{Call: &guestv1.Request_AwaitReady{AwaitReady: call}})
	if err != nil {
		return err
	}
	defer conn.Close()
	defer conn.Bind(ctx)()
	for {
		var found guestv1.ProbeNote
		if err := conn.ReceiveMessage(&found); err != nil {
			return g.broken(ctx, op, err)
		}
		if found.GetReady() {
			return nil
		}
		note(text(found.GetMessage()))
	}
}

// Listener is a port inside on which something listens.
type Listener struct {
	Address string
	Port    uint16
	UDP     bool
	Program string
}

// maxListeners is how many are looked at.
const maxListeners = 256

// WatchPorts calls see with what listens inside, at once and whenever it
// changes, until ctx ends or the connection does. When leave ends, the guest is
// asked to end the call. Nil says that it did: bytes still passed both ways over
// a connection that may be old by then.
func (g *Guest) WatchPorts(ctx, leave context.Context, see func([]Listener)) error {
	const op = "watch the ports of"
	conn, _, err := g.open(ctx, op, &guestv1.Request{Call: &guestv1.Request_WatchPorts{WatchPorts: &guestv1.WatchPorts{}}})
	if err != nil {
		return err
	}
	defer conn.Close()
	defer conn.Bind(ctx)()
	// What is not asked for ends a call, whatever it is.
	defer context.AfterFunc(leave, func() { _, _ = conn.NetConn().Write([]byte{0}) })()
	for {
		var ports guestv1.Ports
		if err := conn.ReceiveMessage(&ports); err != nil {
			if _, said := errors.AsType[*wire.FailureError](err); leave.Err() != nil && (said || errors.Is(err, io.EOF)) {
				return nil
			}
			return g.broken(ctx, op, err)
		}
		var listeners []Listener
		for _, l := range ports.GetListeners()[:min(maxListeners, len(ports.GetListeners()))] {
			if l.GetPort() == 0 || l.GetPort() > 65535 {
				continue
			}
			listeners = append(listeners, Listener{
				Address: text(l.GetAddress()), Port: uint16(l.GetPort()), UDP: l.GetUdp(), Program: text(l.GetProgram()),
			})
		}
		see(listeners)
	}
}

// WatchStats calls see with what the sandbox uses, at once and at each
// interval, until ctx ends, the connection does, or see returns an error,
// which WatchStats then returns. The sample is see's to keep.
func (g *Guest) WatchStats(ctx context.Context, interval time.Duration, see func(*guestv1.Stats) error) error {
	const op = "watch what is used by"
	conn, _, err := g.open(ctx, op, &guestv1.Request{Call: &guestv1.Request_WatchStats{
		WatchStats: &guestv1.WatchStats{IntervalMillis: uint32(interval.Milliseconds())}, //nolint:gosec // At most a minute.
	}})
	if err != nil {
		return err
	}
	defer conn.Close()
	defer conn.Bind(ctx)()
	for {
		sample := new(guestv1.Stats)
		if err := conn.ReceiveMessage(sample); err != nil {
			return g.broken(ctx, op, err)
		}
		sample.Top = sample.GetTop()[:min(16, len(sample.GetTop()))]
		for _, process := range sample.GetTop() {
			process.Command = text(process.GetCommand())
		}
		if err := see(sample); err != nil {
			return err
		}
	}
}

// ask is a call that is one answer.
func (g *Guest) ask(ctx context.Context, op string, request *guestv1.Request) (*guestv1.Response, error) {
	conn, resp, err := g.open(ctx, op, request)
	if err != nil {
		return nil, err
	}
	conn.Close()
	return resp, nil
}

// open begins a call and returns its connection once guestd has said that it
// goes well. The caller closes it.
func (g *Guest) open(ctx context.Context, op string, request *guestv1.Request) (*wire.Conn, *guestv1.Response, error) {
	bounded, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	conn, err := g.begin(bounded, op, request)
	if err != nil {
		return nil, nil, g.late(ctx, bounded, op, err)
	}
	unbind := conn.Bind(bounded)
	response, err := g.answer(ctx, conn, op)
	if unbind(); err != nil {
		conn.Close()
		return nil, nil, err
	}
	// A limit that was reached at this very moment would end all that follows.
	if err := conn.NetConn().SetDeadline(time.Time{}); err != nil {
		conn.Close()
		return nil, nil, g.broken(ctx, op, err)
	}
	return conn, response, nil
}

// late is err, or if that is of a guest that took too long to be reached: so.
func (g *Guest) late(ctx, bounded context.Context, op string, err error) error {
	if ctx.Err() == nil && (bounded.Err() != nil || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)) {
		return g.odd(op, "it gives no answer")
	}
	return err
}

// begin dials and asks.
func (g *Guest) begin(ctx context.Context, op string, request *guestv1.Request) (*wire.Conn, error) {
	raw, err := g.dial(ctx)
	if err != nil {
		return nil, err // it says what it was and of which sandbox
	}
	conn := wire.New(raw, wire.MaxFromGuest)
	unbind := conn.Bind(ctx)
	defer unbind()
	request.Protocol = wire.Protocol
	if err := conn.Send(request); err != nil {
		conn.Close()
		return nil, g.broken(ctx, op, err)
	}
	return conn, nil
}

// answer receives a Response.
func (g *Guest) answer(ctx context.Context, conn *wire.Conn, op string) (*guestv1.Response, error) {
	response := new(guestv1.Response)
	if err := conn.ReceiveMessage(response); err != nil {
		return nil, g.broken(ctx, op, err)
	}
	if failure := response.GetFailure(); failure != nil {
		return nil, g.failed(op, failure, response.GetProtocol())
	}
	return response, nil
}

// broken is a connection that did not carry a call to its end.
func (g *Guest) broken(ctx context.Context, op string, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var failure *wire.FailureError
	switch {
	case errors.As(err, &failure):
		return g.failed(op, failure.Failure, wire.Protocol)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return g.odd(op, "it gives no answer")
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return g.odd(op, "it has closed the connection")
	case errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrClosed):
		return g.odd(op, "the channel to it was cut off") // by whoever found it dead
	}
	return fmt.Errorf("%s %s: %w: %w", op, g.name, sandbox.ErrGuest, err)
}

// odd is a guest that does not do what guestd would.
func (g *Guest) odd(op, what string) error {
	return fmt.Errorf("%s %s: %w: %s", op, g.name, sandbox.ErrGuest, what)
}

// failed is what guestd said went wrong.
func (g *Guest) failed(op string, failure *guestv1.Failure, protocol uint32) error {
	sentinel := map[guestv1.Failure_Code]error{
		guestv1.Failure_CODE_INVALID:       sandbox.ErrInvalid,
		guestv1.Failure_CODE_NOT_FOUND:     sandbox.ErrNotFound,
		guestv1.Failure_CODE_EXISTS:        sandbox.ErrExists,
		guestv1.Failure_CODE_DENIED:        sandbox.ErrDenied,
		guestv1.Failure_CODE_STATE:         sandbox.ErrState,
		guestv1.Failure_CODE_EXHAUSTED:     sandbox.ErrExhausted,
		guestv1.Failure_CODE_UNIMPLEMENTED: sandbox.ErrUnsupported,
		guestv1.Failure_CODE_REFUSED:       sandbox.ErrRefused,
	}[failure.GetCode()]
	message := text(failure.GetMessage())
	switch {
	case sentinel == nil:
		return g.odd(op, message)
	case errors.Is(sentinel, sandbox.ErrUnsupported):
		message = fmt.Sprintf("%s (its guestd speaks version %d of the protocol, this agent %d; a restart gives it this agent's)",
			message, protocol, wire.Protocol)
	}
	return fmt.Errorf("%s %s: %w", op, g.name, &Error{Message: message, Sentinel: sentinel})
}

// Error is what guestd said went wrong. It wraps Sentinel.
type Error struct {
	Message  string
	Sentinel error
}

func (e *Error) Error() string { return e.Message }

func (e *Error) Unwrap() error { return e.Sentinel }

// text is what a guest says for people, fit to be shown: clipped, and without
// what would steer a terminal.
func text(s string) string {
	s = strings.ToValidUTF8(s[:min(len(s), maxText)], "�")
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) {
			return ' '
		}
		return r
	}, s)
}
