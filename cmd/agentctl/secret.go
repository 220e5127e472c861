package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

// maxSecret is the API's.
const maxSecret = 1 << 20

func (a *app) secretCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "secret",
		Short: "Renew the secrets of sandboxes, and show which they have",
		Long: `Renew the secrets of sandboxes, and show which they have. No command shows a
value, and none takes one as an argument, where every process could read it.`,
		Example: `  agentctl secret set web OPENAI_API_KEY
  agentctl secret push --all
  agentctl secret list web`,
	}
	cmd.AddCommand(a.secretSet(), a.secretPush(), a.secretList())
	return cmd
}

func (a *app) secretSet() *cobra.Command {
	file := ""
	cmd := &cobra.Command{
		Use:   "set SANDBOX NAME",
		Short: "Set the value of an inline secret",
		Long: `Set the value of a secret whose source is inline:NAME. It is asked for on a
terminal, otherwise read from stdin, or from --from-file. The newline that ends
a single line is not part of it.

The agent keeps it in memory alone: set it again after the agent was restarted.
A running sandbox is given it at once.`,
		Example: `  agentctl secret set web OPENAI_API_KEY
  pass show openai | agentctl secret set web OPENAI_API_KEY
  agentctl secret set web tls.key --from-file ~/tls.key`,
		Args:              exactly("SANDBOX", "NAME"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if name, _, found := strings.Cut(args[1], "="); found {
				// The rest is not echoed: it may be the value.
				return usagef(cmd, "NAME: a value is not given as an argument, where others can read it; write %s alone", oneLine(name))
			}
			value, err := a.secretValue(cmd.Context(), args[1], file)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			answer, err := c.secrets.SetSecrets(cmd.Context(), &agentv1.SetSecretsRequest{Name: args[0], Values: map[string][]byte{args[1]: value}})
			if err != nil {
				return err
			}
			if delivery := answer.GetDelivery(); delivery.GetOutcome() == agentv1.SecretDelivery_OUTCOME_FAILED {
				err = &exitingWith{fmt.Errorf("%s: %s was not delivered: %s", args[0], args[1], delivery.GetMessage()), exitFailed}
			}
			return errors.Join(a.confirm(answer, fmt.Sprintf("%s set; %s", args[1], deliveryText(args[0], answer.GetDelivery()))), err)
		},
	}
	cmd.Flags().StringVar(&file, "from-file", "", "`file` to read the value from")
	must(cmd.MarkFlagFilename("from-file"))
	return cmd
}

func deliveryText(name string, d *agentv1.SecretDelivery) string {
	switch d.GetOutcome() {
	case agentv1.SecretDelivery_OUTCOME_ACKNOWLEDGED:
		text := name + " has it"
		switch d.GetAction() {
		case agentv1.SecretRotation_ACTION_SIGNAL:
			text += ", and its workload was signalled"
		case agentv1.SecretRotation_ACTION_RESTART:
			text += ", and is restarted"
		}
		return text
	case agentv1.SecretDelivery_OUTCOME_UNCHANGED:
		return name + " has it already"
	case agentv1.SecretDelivery_OUTCOME_FAILED:
		return name + " does not have it yet"
	}
	return name + " is given it when it starts"
}

// secretValue reads a value from a file, or as secretInput does.
func (a *app) secretValue(ctx context.Context, name, file string) ([]byte, error) {
	if file == "" {
		return a.secretInput(ctx, name)
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, &fileError{file: file, problem: unwrapAll(err).Error()}
	}
	defer f.Close()
	value, err := readSecret(f)
	if err != nil {
		return nil, &fileError{file: file, problem: err.Error()}
	}
	return value, nil
}

// secretInput asks for a value on a terminal, otherwise reads it from stdin.
func (a *app) secretInput(ctx context.Context, name string) ([]byte, error) {
	var value []byte
	var err error
	if keyboard := terminalOf(a.stdin); keyboard != nil {
		value, err = a.askSecret(ctx, keyboard, "Value of "+oneLine(name)+" (not shown): ")
	} else {
		value, err = readSecret(a.stdin)
	}
	if err != nil {
		return nil, err
	}
	if len(value) == 0 {
		return nil, sandbox.Invalidf(name, "has an empty value")
	}
	return value, nil
}

// inlineValues reads the values of several: each is asked for on a terminal;
// otherwise the only one is all that stdin has, and of several each is a line.
func (a *app) inlineValues(ctx context.Context, names []string) (map[string][]byte, error) {
	values := map[string][]byte{}
	var lines *bufio.Reader
	if len(names) > 1 && terminalOf(a.stdin) == nil {
		lines = bufio.NewReader(io.LimitReader(a.stdin, int64(len(names))*(maxSecret+2)))
	}
	for _, name := range names {
		var err error
		if lines == nil {
			values[name], err = a.secretInput(ctx, name)
		} else if line, readErr := lines.ReadBytes('\n'); readErr != nil && !errors.Is(readErr, io.EOF) {
			err = readErr
		} else if values[name], err = readSecret(bytes.NewReader(line)); err == nil && len(values[name]) == 0 {
			err = sandbox.Invalidf(name, "has no line of its own on stdin, or an empty one")
		}
		if err != nil {
			return nil, err
		}
	}
	return values, nil
}

// readSecret reads a value, less the newline that ends a single line.
func readSecret(from io.Reader) ([]byte, error) {
	value, err := io.ReadAll(io.LimitReader(from, maxSecret+2))
	if err != nil {
		return nil, err
	}
	if i := bytes.IndexByte(value, '\n'); i >= 0 && i == len(value)-1 {
		value = bytes.TrimSuffix(value[:i], []byte{'\r'})
	}
	if len(value) > maxSecret {
		return nil, errors.New("the value is longer than 1 MiB")
	}
	return value, nil
}

func (a *app) secretPush() *cobra.Command {
	selector, all, force := "", false, false
	cmd := &cobra.Command{
		Use:   "push [SANDBOX]",
		Short: "Read secrets anew and give running sandboxes what changed",
		Long: `Read the sources of secrets anew and give running sandboxes what changed. Each
acknowledges it; then its workload is signalled, restarted or left alone, as its
secret_rotation says. Exit status 1 if one did not acknowledge.`,
		Example: `  agentctl secret push web
  agentctl secret push --selector tier=web
  agentctl secret push --all --force`,
		Args:              atMost(1),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			given := len(args)
			if all {
				given++
			}
			if selector != "" {
				given++
			}
			if given != 1 {
				return usagef(cmd, "give one of SANDBOX, --all and --selector")
			}
			req := &agentv1.PushSecretsRequest{LabelSelector: selector, Force: force}
			if len(args) > 0 {
				req.Name = args[0]
			}
			return a.pushSecrets(cmd.Context(), req)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all sandboxes that run")
	cmd.Flags().StringVarP(&selector, "selector", "l", "", "those with these labels: `key=value,key!=value,key,!key`")
	cmd.Flags().BoolVar(&force, "force", false, "deliver and act also where nothing changed")
	return cmd
}

func (a *app) pushSecrets(ctx context.Context, req *agentv1.PushSecretsRequest) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	answer, err := c.secrets.PushSecrets(ctx, req)
	if err != nil {
		return err
	}
	failed := 0
	for _, d := range answer.GetDeliveries() {
		if d.GetOutcome() == agentv1.SecretDelivery_OUTCOME_FAILED {
			failed++
		}
	}
	switch {
	case a.forPrograms():
		err = a.print(messages(answer.GetDeliveries()))
	case a.quiet:
	case len(answer.GetDeliveries()) == 0:
		fmt.Fprintln(a.stderr, "no running sandboxes")
	default:
		err = a.deliveryTable(answer.GetDeliveries())
	}
	if err == nil && failed > 0 {
		for _, d := range answer.GetDeliveries() {
			if d.GetOutcome() == agentv1.SecretDelivery_OUTCOME_FAILED {
				a.printError(fmt.Errorf("%s: %s", d.GetName(), orElse(d.GetMessage(), "it did not acknowledge")))
			}
		}
		return &reported{fmt.Errorf("%d failed", failed), exitFailed}
	}
	return err
}

func (a *app) deliveryTable(deliveries []*agentv1.SecretDelivery) error {
	t := table{heads: []string{"SANDBOX", "OUTCOME", "ACTION", "CHANGED"}}
	for _, d := range deliveries {
		outcome := plain(lowerName(d.GetOutcome().String(), "OUTCOME_"))
		switch d.GetOutcome() {
		case agentv1.SecretDelivery_OUTCOME_ACKNOWLEDGED:
			outcome.paint = a.out.green
		case agentv1.SecretDelivery_OUTCOME_FAILED:
			outcome.paint = a.out.red
		}
		t.add(plain(d.GetName()), outcome, plain(lowerName(d.GetAction().String(), "ACTION_")), plain(strings.Join(d.GetChanged(), ",")))
	}
	return t.write(a.stdout, a.out.bold)
}

// lowerName is an enum value as people read it; empty if it is unspecified.
func lowerName(value, prefix string) string {
	name := strings.TrimPrefix(value, prefix)
	if name == "UNSPECIFIED" {
		return ""
	}
	return strings.ReplaceAll(strings.ToLower(name), "_", "-")
}

func (a *app) secretList() *cobra.Command {
	return &cobra.Command{
		Use:   "list SANDBOX",
		Short: "List a sandbox's secrets: names, sources and versions, never values",
		Long: `List a sandbox's secrets: names, sources and versions, never values. A version
changes when the value does, and says nothing else of it.`,
		Aliases:           []string{"ls"},
		Example:           "  agentctl secret list web\n  agentctl secret list web -o json",
		Args:              exactly("SANDBOX"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			ctx, cancel := quick(cmd.Context())
			defer cancel()
			answer, err := c.secrets.ListSecrets(ctx, &agentv1.ListSecretsRequest{Name: args[0]})
			if err != nil {
				return err
			}
			switch {
			case a.forPrograms():
				return a.print(messages(answer.GetSecrets()))
			case a.quiet:
				for _, s := range answer.GetSecrets() {
					fmt.Fprintln(a.stdout, s.GetName())
				}
				return nil
			case len(answer.GetSecrets()) == 0:
				fmt.Fprintln(a.stderr, "no secrets")
				return nil
			}
			return a.secretTable(answer.GetSecrets(), time.Now())
		},
	}
}

func (a *app) secretTable(secrets []*agentv1.Secret, now time.Time) error {
	t := table{heads: []string{"NAME", "SOURCE", "AS", "VERSION", "DELIVERED", "STATE"}}
	for _, s := range secrets {
		as, delivered := "environment", ""
		if s.GetFile() {
			as = "/run/secrets/" + s.GetName()
		}
		if at := s.GetDeliverTime(); at != nil {
			delivered = age(now.Sub(at.AsTime())) + " ago"
		}
		t.add(plain(s.GetName()), plain(s.GetSource()), plain(as), plain(s.GetVersion()), plain(delivered), a.secretState(s))
	}
	return t.write(a.stdout, a.out.bold)
}

func (a *app) secretState(s *agentv1.Secret) cell {
	text, paint := "delivered", a.out.green
	switch {
	case s.GetMissing():
		text, paint = "missing, optional", a.out.yellow
	case s.GetMessage() != "":
		text, paint = "failed", a.out.red
	case s.GetDeliverTime() == nil:
		text, paint = "not delivered", a.out.dim
	}
	if s.GetMessage() != "" {
		text += ": " + s.GetMessage()
	}
	return cell{text, paint}
}
