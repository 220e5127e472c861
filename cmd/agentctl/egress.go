package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

func (a *app) egressCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "egress",
		Short: "See and change what sandboxes may connect to",
		Long: `See and change what sandboxes may connect to, on drivers that enforce it. Whatever
is allowed, no sandbox reaches the host itself, link-local addresses, the metadata
services of clouds, multicast, broadcast, or another sandbox.`,
		Example: `  agentctl egress show web
  agentctl egress set web deny
  agentctl egress set web api.openai.com:443/tcp '*.npmjs.org:443' 10.1.0.0/16:5432`,
	}
	cmd.AddCommand(a.egressShow(), a.egressSet())
	return cmd
}

func (a *app) egressSet() *cobra.Command {
	return &cobra.Command{
		Use:   "set NAME POLICY...",
		Short: "Replace what a sandbox may connect to",
		Long: `Replace what a sandbox may connect to: at once if it runs, also for connections
that are open, and for its next lives. The policy is one of

  allow                            everything that a sandbox can reach at all
  deny                             nothing, and no name is resolved
  NAME_OR_CIDR[:PORTS][/tcp|udp]   what such rules name, several with spaces or
                                   commas between them, and nothing else

and, beside any of them, deny-private: no private or shared addresses (RFC 1918,
RFC 6598), unless a rule has them as a CIDR. A NAME may begin with "*.", for all
names below a domain. PORTS are a port, a range as 8000-8999, or several with +
between them; without them a rule is for all.`,
		Example: `  agentctl egress set web deny
  agentctl egress set web allow deny-private
  agentctl egress set web api.openai.com:443/tcp '*.npmjs.org:80+443'
  agentctl egress set db 10.1.0.0/16:5432/tcp,192.0.2.7`,
		Args:              atLeast("NAME", "POLICY"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			policy, err := parseEgress(strings.Join(args[1:], ","))
			if err != nil {
				return usagef(cmd, "POLICY: %s", err)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			answer, err := c.sandboxes.UpdateSandbox(cmd.Context(), &agentv1.UpdateSandboxRequest{
				Sandbox:    &agentv1.Sandbox{Name: args[0], Spec: &agentv1.SandboxSpec{Egress: policy}},
				UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"spec.egress"}}, RequestId: requestID(),
			})
			if err != nil {
				return err
			}
			words := egressWords(answer.GetSandbox().GetSpec().GetEgress())
			return a.confirm(answer.GetSandbox(), args[0]+": "+oneLine(strings.Join(words, ", ")))
		},
	}
}

func (a *app) egressShow() *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show what a sandbox may connect to, and what it was kept from",
		Long: `Show what a sandbox may connect to, and what it was kept from in its present life:
the latest first, at most 64 destinations.`,
		Example:           "  agentctl egress show web\n  agentctl egress show web -o json",
		Args:              exactly("NAME"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			ctx, cancel := quick(cmd.Context())
			defer cancel()
			sb, err := c.sandbox(ctx, args[0])
			if err != nil {
				return err
			}
			refused, err := c.sandboxes.ListRefusals(ctx, &agentv1.ListRefusalsRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return a.showEgress(sb.GetSpec().GetEgress(), refused)
		},
	}
}

// egressView is what `egress show` prints for programs.
type egressView struct {
	Egress     json.RawMessage `json:"egress"`
	Refusals   json.RawMessage `json:"refusals"`
	TotalCount string          `json:"total_count"`
}

func (a *app) showEgress(policy *agentv1.Egress, refused *agentv1.ListRefusalsResponse) error {
	if a.forPrograms() {
		view := egressView{TotalCount: fmt.Sprint(refused.GetTotalCount())}
		var err error
		if view.Egress, err = toJSON(policy); err != nil {
			return err
		}
		if view.Refusals, err = toJSON(messages(refused.GetRefusals())); err != nil {
			return err
		}
		return a.print(view)
	}
	if a.quiet {
		for _, r := range refused.GetRefusals() {
			fmt.Fprintln(a.stdout, oneLine(r.GetDestination()))
		}
		return nil
	}
	p := &page{}
	p.each("Egress", egressLines(policy))
	p.add("Refused", times(refused.GetTotalCount()))
	if err := p.write(a.stdout, a.out.bold); err != nil || len(refused.GetRefusals()) == 0 {
		return err
	}
	fmt.Fprintln(a.stdout)
	return a.refusalTable(refused.GetRefusals(), time.Now())
}

func (a *app) refusalTable(refusals []*agentv1.Refusal, now time.Time) error {
	t := table{heads: []string{"REFUSED", "PORT", "PROTOCOL", "COUNT", "LAST"}}
	for _, r := range refusals {
		port := ""
		if r.GetPort() > 0 {
			port = fmt.Sprint(r.GetPort())
		}
		t.add(plain(r.GetDestination()), plain(port), plain(lowerName(r.GetKind().String(), "KIND_")),
			plain(fmt.Sprint(r.GetCount())), plain(age(now.Sub(r.GetLastTime().AsTime()))+" ago"))
	}
	return t.write(a.stdout, a.out.bold)
}

// egressLines are a policy for people, a line for each word.
func egressLines(policy *agentv1.Egress) []string {
	words := egressWords(policy)
	if policy.GetMode() == agentv1.Egress_MODE_LIST && len(policy.GetRules()) == 0 {
		words = append([]string{"nothing: a list without rules"}, words...)
	}
	if len(words) == 0 {
		return []string{"no policy: " + egressAllow}
	}
	return words
}

func times(n uint64) string {
	switch n {
	case 0:
		return "nothing"
	case 1:
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}
