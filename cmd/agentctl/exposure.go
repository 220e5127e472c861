package main

import (
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// warnOfExposures tells what of the host's a sandbox can read that looks like
// secrets.
func (a *app) warnOfExposures(sb *agentv1.Sandbox) {
	told := false
	for _, x := range sb.GetStatus().GetExposures() {
		if x.GetTotalCount() == 0 {
			a.notef("%s, at %s in the sandbox, was looked through for secrets in part only: it is too large or too slow", x.GetSource(), x.GetTarget())
			continue
		}
		told = true
		a.notef("warning: the sandbox can read what looks like secrets in %s, at %s: %s", x.GetSource(), x.GetTarget(), exposureText(x))
	}
	if told && !a.quiet {
		fmt.Fprintf(a.stderr, "%smove them out of the folder; give the sandbox what it needs with --secret or --env-file, or leave the folder out with --no-workspace and copy into the sandbox with agentctl sandbox cp\n",
			a.err.bold(hintPrefix))
	}
}

// exposureText names the files of an exposure.
func exposureText(x *agentv1.Exposure) string {
	var names, parts []string
	for _, f := range x.GetFiles() {
		names = append(names, f.GetPath())
	}
	listed := strings.Join(names, ", ")
	if more := int(x.GetTotalCount()) - len(names); more > 0 {
		listed += fmt.Sprintf(" and %d more", more)
	}
	if listed != "" {
		parts = append(parts, listed)
	}
	if x.GetIncomplete() {
		parts = append(parts, "not all of it was looked through")
	}
	return strings.Join(parts, "; ")
}

// exclude refuses patterns of files that a mount is to leave out. Neither a bind
// mount nor virtiofs can, and what covers the files that are there now would not
// cover those that come later.
func (s *specFile) exclude(n *yaml.Node, path string) error {
	return withHint(s.errorf(n, path, "is not possible: a folder is shown whole, with what comes into it later"),
		"move what the sandbox is not to see out of the folder, and deliver what it needs with secrets:; or write workspace: none, and copy into it with agentctl sandbox cp")
}
