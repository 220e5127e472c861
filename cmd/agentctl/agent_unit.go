package main

import (
	"fmt"
	"strings"
)

// systemdUnit is what systemd calls the agent.
const systemdUnit = "choiros-agent.service"

// service is the agent's unit for a user's systemd, systemd.service(5);
// docs/agent.md says what each line is for.
func (u unit) service() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# %s\n", madeBy)
	b.WriteString(`[Unit]
Description=choiros agent, which keeps this user's sandboxes
Wants=podman.socket
After=podman.socket
StartLimitIntervalSec=0

[Service]
Type=notify
`)
	fmt.Fprintf(&b, "ExecStart=%s\n", u.command())
	for _, v := range u.env {
		fmt.Fprintf(&b, "Environment=%s\n", systemdWord(v[0]+"="+v[1]))
	}
	b.WriteString(`Restart=always
RestartSec=100ms
RestartSteps=8
RestartMaxDelaySec=30s
FileDescriptorStoreMax=2048
LimitNOFILE=131072

[Install]
WantedBy=default.target
`)
	return b.String()
}

// command is the line that systemd starts the agent with. A colon before the
// program says that $ has no meaning in it.
func (u unit) command() string {
	var words []string
	for _, word := range append([]string{u.program}, u.args...) {
		words = append(words, systemdWord(word))
	}
	line := strings.Join(words, " ")
	if strings.Contains(line, "$") {
		return ":" + line
	}
	return line
}

// systemdWord writes a word as systemd.syntax(7) has it: % begins a specifier
// everywhere, and quotes are needed for white space and what quotes.
func systemdWord(word string) string {
	word = strings.ReplaceAll(word, "%", "%%")
	if word != "" && !strings.ContainsAny(word, " \t'\"\\;") {
		return word
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(word) + `"`
}
