package main

import (
	"io"
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func doc(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile("../../docs/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// commands returns the whole tree.
func commands() []*cobra.Command {
	a := &app{stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard, getenv: func(string) string { return "" }}
	var all []*cobra.Command
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		all = append(all, cmd)
		for _, child := range cmd.Commands() {
			walk(child)
		}
	}
	walk(a.rootCommand())
	return all
}

func TestDocsMentionEveryCommandAndFlag(t *testing.T) {
	t.Parallel()
	text := doc(t, "agentctl.md")
	for _, cmd := range commands() {
		if cmd.Runnable() && !cmd.HasSubCommands() && !strings.Contains(text, "`"+cmd.CommandPath()) {
			t.Errorf("docs/agentctl.md does not mention %s", cmd.CommandPath())
		}
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Name != "help" && !strings.Contains(text, "--"+f.Name) {
				t.Errorf("docs/agentctl.md does not mention --%s of %s", f.Name, cmd.CommandPath())
			}
			if f.Shorthand != "" && f.Name != "help" && !strings.Contains(text, "`-"+f.Shorthand) {
				t.Errorf("docs/agentctl.md does not mention -%s of %s", f.Shorthand, cmd.CommandPath())
			}
		})
	}
}

func TestDocsListTheExitStatuses(t *testing.T) {
	t.Parallel()
	if !strings.Contains(doc(t, "agentctl.md"), exitCodes()) {
		t.Errorf("docs/agentctl.md does not have what `agentctl help exit-codes` prints:\n%s", exitCodes())
	}
}

func TestEveryCommandHasHelpWithExamples(t *testing.T) {
	t.Parallel()
	for _, cmd := range commands() {
		if cmd.Name() == "help" || !cmd.Runnable() {
			continue
		}
		if cmd.Short == "" || cmd.Example == "" {
			t.Errorf("%s has no short help or no example", cmd.CommandPath())
		}
		for line := range strings.SplitSeq(cmd.Example, "\n") {
			if !strings.HasPrefix(line, "  ") {
				t.Errorf("%s: the example %q is not indented", cmd.CommandPath(), line)
			}
		}
	}
}

func TestSpecFileDocs(t *testing.T) {
	t.Parallel()
	text := doc(t, "sandbox-yaml.md")
	if !strings.Contains(text, "```yaml\n"+specFileExample+"```") {
		t.Error("docs/sandbox-yaml.md does not have the example of `agentctl help sandbox-yaml`")
	}
	// Every piece of YAML in it is read: those that show several forms of one
	// key, form by form.
	for i, piece := range strings.Split(text, "```yaml\n")[1:] {
		piece, _, _ = strings.Cut(piece, "```")
		forms := []string{""}
		for line := range strings.Lines(piece) {
			key, _, isKey := strings.Cut(line, ":")
			last := len(forms) - 1
			if isKey && !strings.HasPrefix(line, " ") && strings.HasPrefix("\n"+forms[last], "\n"+key+":") {
				forms = append(forms, "")
				last++
			}
			forms[last] += line
		}
		for _, form := range forms {
			if _, err := parseSpecFile([]byte(form), "sandbox-yaml.md", "/work", "/home/ada"); err != nil {
				t.Errorf("piece %d: %v\n%s", i, err, form)
			}
		}
	}
	for key := range (&specFile{def: newDefinition("/work")}).keys() {
		if !strings.Contains(text, "| `"+key+"` |") {
			t.Errorf("docs/sandbox-yaml.md does not explain %s", key)
		}
	}
}
