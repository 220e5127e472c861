package main

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

func (a *app) portCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "port",
		Short: "Make ports of sandboxes reachable",
		Long: `Make ports of sandboxes reachable: on the agent's host (add, remove, list), or
through agentctl itself, wherever it runs (forward, tunnel). A connection starts
a sandbox that does not run, and counts as activity while it is open.`,
		Example: `  agentctl port add web 8080
  agentctl port list web
  agentctl port forward web 8080:8080
  ssh -o ProxyCommand='agentctl port tunnel web 22' me@web`,
	}
	cmd.AddCommand(a.portAdd(), a.portRemove(), a.portList(), a.portForward(), a.portTunnel())
	return cmd
}

func (a *app) portAdd() *cobra.Command {
	name, bind := "", ""
	cmd := &cobra.Command{
		Use:   "add SANDBOX [HOST:]GUEST[/udp]",
		Short: "Forward a port of the host to a port of a sandbox",
		Long: `Forward a port of the agent's host to a port of a sandbox, running or not, from
now on and after every restart. Without HOST the agent leases one from its
range. What listens on the sandbox's own 127.0.0.1 is reached too.`,
		Example: `  agentctl port add web 8080
  agentctl port add web 9000:8080 --name app
  agentctl port add dns 5353:53/udp --bind 0.0.0.0`,
		Args:              exactly("SANDBOX", "PORT"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := parsePort(args[1])
			if err != nil {
				return usagef(cmd, "PORT: %s", err)
			}
			if bind != "" {
				if _, err := netip.ParseAddr(bind); err != nil {
					return usagef(cmd, "--bind: %q is not an IP address", bind)
				}
				p.BindAddress = bind
			}
			p.Name = name
			c, err := a.client()
			if err != nil {
				return err
			}
			answer, err := c.ports.AddPort(cmd.Context(), &agentv1.AddPortRequest{Name: args[0], Port: p, RequestId: requestID()})
			if err != nil {
				return err
			}
			forward := answer.GetForward()
			if forward.GetProblem() != "" && !a.forPrograms() {
				a.notef("the agent cannot listen on %s yet: %s; it goes on trying", forward.GetEndpoint().GetAddress(), forward.GetProblem())
			}
			return a.confirm(forward, endpointText(forward.GetEndpoint()))
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "`name` for people (default: the number)")
	cmd.Flags().StringVar(&bind, "bind", "", "`address` of the host to listen on (default 127.0.0.1)")
	return cmd
}

// endpointText is where a port is reachable: 127.0.0.1:12000 -> 8080/tcp (app).
func endpointText(e *agentv1.Endpoint) string {
	text := fmt.Sprintf("%s -> %d/%s", e.GetAddress(), e.GetGuestPort(), protocolName(e.GetProtocol()))
	if name := e.GetName(); name != "" && name != fmt.Sprint(e.GetGuestPort()) {
		text += " (" + name + ")"
	}
	return text
}

// parseGuestPort reads GUEST[/tcp|udp].
func parseGuestPort(s string) (uint32, agentv1.Protocol, error) {
	number, name, found := strings.Cut(s, "/")
	if !found {
		name = "tcp"
	}
	protocol, err := parseProtocol(name)
	if err != nil {
		return 0, 0, fmt.Errorf("%q is not of the form GUEST[/tcp|udp]", s)
	}
	port, err := parsePortNumber(number, 1)
	return port, protocol, err
}

func (a *app) portRemove() *cobra.Command {
	force := false
	cmd := &cobra.Command{
		Use:               "remove SANDBOX GUEST[/udp]",
		Aliases:           []string{"rm"},
		Short:             "End a forward and its connections",
		Example:           "  agentctl port remove web 8080\n  agentctl port remove dns 53/udp",
		Args:              exactly("SANDBOX", "GUEST"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			port, protocol, err := parseGuestPort(args[1])
			if err != nil {
				return usagef(cmd, "GUEST: %s", err)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			_, err = c.ports.RemovePort(cmd.Context(), &agentv1.RemovePortRequest{
				Name: args[0], GuestPort: port, Protocol: protocol, AllowMissing: force, RequestId: requestID(),
			})
			if reasonOf(err) == "NOT_FOUND" {
				err = withHint(err, "agentctl port list %s", args[0])
			}
			if err != nil {
				return err
			}
			return a.confirm(struct {
				GuestPort uint32 `json:"guest_port"`
				Protocol  string `json:"protocol"`
				Removed   bool   `json:"removed"`
			}{port, protocolName(protocol), true}, fmt.Sprintf("%s: %d/%s removed", args[0], port, protocolName(protocol)))
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "succeed also if there is no such forward")
	return cmd
}

func (a *app) portList() *cobra.Command {
	return &cobra.Command{
		Use:     "list SANDBOX",
		Aliases: []string{"ls"},
		Short:   "List a sandbox's forwards, and what else listens inside",
		Long: `List a sandbox's forwards with their connections and bytes, and the ports on
which something listens inside that are not forwarded.`,
		Example:           "  agentctl port list web\n  agentctl port list web -o json",
		Args:              exactly("SANDBOX"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			answer, err := a.listPorts(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			switch {
			case a.forPrograms():
				return a.print(answer)
			case a.quiet:
				for _, f := range answer.GetForwards() {
					fmt.Fprintln(a.stdout, f.GetEndpoint().GetAddress())
				}
				return nil
			case len(answer.GetForwards())+len(answer.GetDetected()) == 0:
				fmt.Fprintln(a.stderr, "no ports")
				return nil
			}
			return a.portTables(answer)
		},
	}
}

func (a *app) listPorts(ctx context.Context, name string) (*agentv1.ListPortsResponse, error) {
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	ctx, cancel := quick(ctx)
	defer cancel()
	return c.ports.ListPorts(ctx, &agentv1.ListPortsRequest{Name: name})
}

func (a *app) portTables(ports *agentv1.ListPortsResponse) error {
	forwards := table{heads: []string{"ADDRESS", "GUEST", "NAME", "OPEN", "TOTAL", "FAILED", "IN", "OUT", "STATE"}}
	for _, f := range ports.GetForwards() {
		state := cell{"listening", a.out.green}
		if f.GetProblem() != "" {
			state = cell{f.GetProblem(), a.out.red}
		} else if f.GetAutomatic() {
			state.text += ", automatic"
		}
		e := f.GetEndpoint()
		forwards.add(plain(e.GetAddress()), plain(fmt.Sprintf("%d/%s", e.GetGuestPort(), protocolName(e.GetProtocol()))), plain(e.GetName()),
			plain(fmt.Sprint(f.GetOpenConnections())), plain(fmt.Sprint(f.GetTotalConnections())), plain(fmt.Sprint(f.GetFailedConnections())),
			plain(size(f.GetReceiveBytes())), plain(size(f.GetTransmitBytes())), state)
	}
	detected := table{heads: []string{"DETECTED", "PROGRAM", "STATE"}}
	for _, d := range ports.GetDetected() {
		state := cell{"not forwarded", a.out.dim}
		if d.GetRefusal() != "" {
			state = cell{"not forwarded: " + d.GetRefusal(), a.out.yellow}
		}
		detected.add(plain(fmt.Sprintf("%d/%s", d.GetGuestPort(), protocolName(d.GetProtocol()))), plain(d.GetProgram()), state)
	}
	for i, t := range []*table{&forwards, &detected} {
		if len(t.rows) == 0 {
			continue
		}
		if i > 0 && len(forwards.rows) > 0 {
			fmt.Fprintln(a.stdout)
		}
		if err := t.write(a.stdout, a.out.bold); err != nil {
			return err
		}
	}
	return nil
}
