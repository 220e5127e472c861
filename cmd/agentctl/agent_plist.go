package main

import (
	"encoding/xml"
	"fmt"
	"strings"
)

// unit is what a service manager is to keep running.
type unit struct {
	program string   // the agent, an absolute path
	args    []string // its flags
	env     [][2]string
	log     string // of launchd: the file that its output goes to
}

// madeBy is in each unit that agentctl wrote: another one it leaves alone.
const madeBy = "Made by agentctl agent install; agentctl agent uninstall removes it."

// launchdLabel is what launchd calls the agent.
const launchdLabel = "choiros.agent"

// plist is the agent's property list for launchd, launchd.plist(5). What it
// says is for these reasons:
//
//   - AbandonProcessGroup: when the agent ends, launchd ends what is left of
//     its process group otherwise. Shims have groups of their own; whatever
//     else the agent started is to outlive it as well.
//   - ProcessType: launchd throttles the processor and the disk of what it
//     takes for work in the background, and machines with it.
//   - ExitTimeOut: how long it waits between SIGTERM and SIGKILL; requests may
//     take a while to end.
func (u unit) plist() string {
	var b strings.Builder
	b.WriteString(xml.Header)
	b.WriteString(`<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">` + "\n")
	fmt.Fprintf(&b, "<!-- %s -->\n<plist version=\"1.0\">\n<dict>\n", madeBy)
	key := func(name, value string) {
		fmt.Fprintf(&b, "\t<key>%s</key>\n%s", name, value)
	}
	key("Label", plistString(1, launchdLabel))
	var words strings.Builder
	for _, word := range append([]string{u.program}, u.args...) {
		words.WriteString(plistString(2, word))
	}
	key("ProgramArguments", "\t<array>\n"+words.String()+"\t</array>\n")
	if len(u.env) > 0 {
		var variables strings.Builder
		for _, v := range u.env {
			fmt.Fprintf(&variables, "\t\t<key>%s</key>\n%s", escapeXML(v[0]), plistString(2, v[1]))
		}
		key("EnvironmentVariables", "\t<dict>\n"+variables.String()+"\t</dict>\n")
	}
	key("RunAtLoad", "\t<true/>\n")
	key("KeepAlive", "\t<true/>\n")
	key("AbandonProcessGroup", "\t<true/>\n")
	key("ProcessType", plistString(1, "Interactive"))
	key("ExitTimeOut", "\t<integer>30</integer>\n")
	key("StandardOutPath", plistString(1, u.log))
	key("StandardErrorPath", plistString(1, u.log))
	b.WriteString("</dict>\n</plist>\n")
	return b.String()
}

func plistString(indent int, s string) string {
	return strings.Repeat("\t", indent) + "<string>" + escapeXML(s) + "</string>\n"
}

func escapeXML(s string) string {
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;").Replace(s)
}
