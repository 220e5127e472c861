package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// tunnelChunk is how many bytes of a connection are sent at once.
const tunnelChunk = 64 << 10

func (a *app) portTunnel() *cobra.Command {
	noWake := false
	cmd := &cobra.Command{
		Use:   "tunnel SANDBOX GUEST",
		Short: "Connect stdin and stdout to a port of a sandbox",
		Long: `Connect stdin and stdout to a TCP port of a sandbox, through the agent and
without a port of its host: what ssh takes as its ProxyCommand. The end of stdin
is passed on, as is that of the connection.`,
		Example: `  ssh -o ProxyCommand='agentctl port tunnel web 22' me@web
  printf 'GET /health HTTP/1.0\r\n\r\n' | agentctl port tunnel web 8080`,
		Args:              exactly("SANDBOX", "GUEST"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			port, err := parseTCP(args[1])
			if err != nil {
				return usagef(cmd, "GUEST: %s", err)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithCancel(cmd.Context())
			defer cancel()
			t, err := c.tunnel(ctx, &agentv1.TunnelOpen{Name: args[0], GuestPort: port, NoWake: noWake})
			if err != nil {
				return err
			}
			// Nobody waits for it: a read of stdin cannot be cut short.
			go func() { _ = t.send(a.stdin) }()
			return t.receive(a.stdout, func() error {
				if closer, ok := a.stdout.(io.Closer); ok && terminalOf(a.stdin) == nil {
					return closer.Close() // the reader of stdout sees the end, and may go on writing
				}
				cancel()
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&noWake, "no-wake", false, "fail if the sandbox does not run, instead of starting it")
	return cmd
}

func parseTCP(s string) (uint32, error) {
	port, protocol, err := parseGuestPort(s)
	if err == nil && protocol != agentv1.Protocol_PROTOCOL_TCP {
		err = fmt.Errorf("%q: TCP only; agentctl port add forwards UDP", s)
	}
	return port, err
}

// tunnel is one connection to a port inside a sandbox.
type tunnel struct {
	explain func(error) error // of the call's errors
	stream  interface {
		Context() context.Context
		Send(*agentv1.TunnelRequest) error
		Recv() (*agentv1.TunnelResponse, error)
		CloseSend() error
	}
}

// tunnel connects; the connection ends with ctx.
func (c *client) tunnel(ctx context.Context, open *agentv1.TunnelOpen) (*tunnel, error) {
	stream, err := c.ports.Tunnel(ctx)
	if err != nil {
		return nil, c.link.explain(ctx, err)
	}
	t := &tunnel{func(err error) error { return c.link.explain(ctx, err) }, stream}
	// An error of Send is io.EOF: what Recv returns says more.
	if err := stream.Send(&agentv1.TunnelRequest{Message: &agentv1.TunnelRequest_Open{Open: open}}); err != nil && !errors.Is(err, io.EOF) {
		return nil, c.link.explain(ctx, err)
	}
	answer, err := stream.Recv()
	if err != nil {
		return nil, c.link.explain(ctx, err)
	}
	if answer.GetOpened() == nil {
		return nil, errors.New("the agent did not say that the connection is open")
	}
	return t, nil
}

// send carries what a reader has into the sandbox, and its end.
func (t *tunnel) send(from io.Reader) error {
	chunk := make([]byte, tunnelChunk)
	for {
		n, readErr := from.Read(chunk)
		if n > 0 {
			if err := t.stream.Send(&agentv1.TunnelRequest{Message: &agentv1.TunnelRequest_Data{Data: chunk[:n]}}); err != nil {
				return err
			}
		}
		if errors.Is(readErr, io.EOF) {
			return t.stream.CloseSend()
		}
		if readErr != nil {
			return readErr
		}
	}
}

// receive carries what comes out of the sandbox to a writer until the call
// ends. eof is called when the inside has closed its direction.
func (t *tunnel) receive(to io.Writer, eof func() error) error {
	ended := false
	for {
		answer, err := t.stream.Recv()
		switch {
		case errors.Is(err, io.EOF) || err != nil && ended && t.stream.Context().Err() != nil:
			return nil
		case err != nil:
			return t.explain(err)
		case answer.GetEof() != nil:
			ended = true
			err = eof()
		case !ended:
			_, err = to.Write(answer.GetData())
		}
		if err != nil {
			return err
		}
	}
}

func (a *app) portForward() *cobra.Command {
	noWake := false
	cmd := &cobra.Command{
		Use:   "forward SANDBOX [[BIND:]LOCAL:]GUEST...",
		Short: "Listen here and carry connections into a sandbox, until Ctrl-C",
		Long: `Listen on ports of this machine and carry each connection (TCP) to a port of a
sandbox, through the agent, until Ctrl-C. This machine need not be the agent's
host. LOCAL is GUEST unless it is given; 0 takes any that is free.`,
		Example: `  agentctl port forward web 8080
  agentctl port forward web 9000:8080 9001:9229
  agentctl port forward web 0:5432 --agent builder.example.com:7443`,
		Args:              atLeast("SANDBOX", "PORT"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ports, err := parseForwards(args[1:])
			if err != nil {
				return usagef(cmd, "PORT: %s", err)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			// A sandbox that is not there is told before anything listens.
			if _, err := c.sandbox(cmd.Context(), args[0]); err != nil {
				return err
			}
			return a.forward(cmd.Context(), c, args[0], ports, noWake)
		},
	}
	cmd.Flags().BoolVar(&noWake, "no-wake", false, "do not start the sandbox if it does not run")
	return cmd
}

func parseForwards(args []string) ([]*agentv1.Port, error) {
	var ports []*agentv1.Port
	for _, arg := range args {
		p, err := parsePort(arg)
		if err != nil {
			return nil, err
		}
		if p.GetProtocol() == agentv1.Protocol_PROTOCOL_UDP {
			return nil, fmt.Errorf("%q: TCP only; agentctl port add forwards UDP", arg)
		}
		if !strings.Contains(arg, ":") {
			p.HostPort = p.GetGuestPort()
		}
		ports = append(ports, p)
	}
	return ports, nil
}

// forwarded is a listener of `port forward`, as programs read it.
type forwarded struct {
	Address   string `json:"address"`
	GuestPort uint32 `json:"guest_port"`
}

// forward listens and carries connections until ctx ends.
func (a *app) forward(ctx context.Context, c *client, name string, ports []*agentv1.Port, noWake bool) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	var carriers sync.WaitGroup
	defer carriers.Wait()
	defer cancel(nil)
	var listeners []net.Listener
	for _, p := range ports {
		address := net.JoinHostPort(orElse(p.GetBindAddress(), "127.0.0.1"), fmt.Sprint(p.GetHostPort()))
		listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
		if err != nil {
			return withHint(fmt.Errorf("listen on %s: %w", address, unwrapAll(err)), "another port, or 0 for any: agentctl port forward %s 0:%d", name, p.GetGuestPort())
		}
		defer listener.Close()
		listeners = append(listeners, listener)
	}
	for i, listener := range listeners {
		line := forwarded{listener.Addr().String(), ports[i].GetGuestPort()}
		if a.forPrograms() {
			err = a.printEvent(line)
		} else {
			_, err = fmt.Fprintf(a.stdout, "%s -> %d\n", line.Address, line.GuestPort)
		}
		if err != nil {
			return err
		}
		open := &agentv1.TunnelOpen{Name: name, GuestPort: ports[i].GetGuestPort(), NoWake: noWake}
		carriers.Go(func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					cancel(err) // the listener was closed, or the process is out of descriptors
					return
				}
				carriers.Go(func() { a.carry(ctx, c, conn, open) })
			}
		})
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

// carry ties one connection to a tunnel. One that fails is reset: its client
// is not to take it for a proper end.
func (a *app) carry(ctx context.Context, c *client, conn net.Conn, open *agentv1.TunnelOpen) {
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t, err := c.tunnel(ctx, open)
	if err == nil {
		stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
		defer stop()
		var sender sync.WaitGroup
		sender.Go(func() {
			if t.send(conn) != nil {
				cancel() // the client has reset its connection: so is the one inside
			}
		})
		err = t.receive(conn, func() error {
			if half, ok := conn.(interface{ CloseWrite() error }); ok {
				return half.CloseWrite()
			}
			return nil
		})
		if err != nil {
			reset(conn)
		}
		_ = conn.Close() // the sender's read ends with it
		sender.Wait()
	} else {
		reset(conn)
	}
	if ctx.Err() == nil && (statusOf(err) != nil || errorOfOurs(err) != nil) {
		a.notef("connection to port %d of %s: %s", open.GetGuestPort(), open.GetName(), message(err))
	}
}

// reset makes closing a connection abort it; see SO_LINGER in socket(7).
func reset(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // it is closed either way
	}
}
