package main

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// awkward is a unit with all that has to be quoted somewhere.
func awkward() unit {
	return unit{
		program: `/Users/ada & bob/<100%> {$HOME}/agent`, // systemd takes no quotes here
		args:    []string{"--config", `/Users/ada/it's my "config";\$HOME.toml`, ""},
		env:     [][2]string{{"PATH", "/opt/homebrew/bin:/usr/bin"}, {"XDG_STATE_HOME", "/Users/ada/100% state"}},
		log:     "/Users/ada/Library/Logs/choiros-agent/agent.log",
	}
}

// plain is the unit of docs/agent.md.
func plainUnit() unit {
	return unit{program: "/home/ada/.local/bin/agent", log: "/home/ada/.local/state/choiros-agent/agent.log"}
}

func TestUnitsAreAsTheyWere(t *testing.T) {
	t.Parallel()
	golden(t, "agent.plist.golden", awkward().plist())
	golden(t, "agent-plain.plist.golden", plainUnit().plist())
	golden(t, "agent.service.golden", awkward().service())
	golden(t, "agent-plain.service.golden", plainUnit().service())
}

func TestDocsHaveTheUnit(t *testing.T) {
	t.Parallel()
	_, text, _ := strings.Cut(plainUnit().service(), "\n") // without whose work it is
	if !strings.Contains(doc(t, "agent.md"), "```\n"+text+"```") {
		t.Errorf("docs/agent.md does not have the unit that agentctl agent install writes:\n%s", text)
	}
}

func TestPlistsSayWhatTheyWereMadeOf(t *testing.T) {
	t.Parallel()
	for _, u := range []unit{awkward(), plainUnit()} {
		got, err := parsePlist(u.plist())
		if err != nil {
			t.Errorf("%v\n%s", err, u.plist())
			continue
		}
		var words []any
		for _, word := range append([]string{u.program}, u.args...) {
			words = append(words, word)
		}
		want := map[string]any{
			"Label": "choiros.agent", "ProgramArguments": words,
			"RunAtLoad": true, "KeepAlive": true, "AbandonProcessGroup": true,
			"ProcessType": "Interactive", "ExitTimeOut": 30, "StandardOutPath": u.log, "StandardErrorPath": u.log,
		}
		if len(u.env) > 0 {
			env := map[string]any{}
			for _, v := range u.env {
				env[v[0]] = v[1]
			}
			want["EnvironmentVariables"] = env
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
}

// launchdKeys are the keys of launchd.plist(5) that are used here, and the type
// that launchd wants each to be; with another it ignores them.
var launchdKeys = map[string]string{
	"Label": "string", "ProgramArguments": "array", "EnvironmentVariables": "dict", "RunAtLoad": "bool",
	"KeepAlive": "bool", "AbandonProcessGroup": "bool", "ProcessType": "string", "ExitTimeOut": "integer",
	"StandardOutPath": "string", "StandardErrorPath": "string",
}

func TestPlistKeysAreLaunchds(t *testing.T) {
	t.Parallel()
	got, err := parsePlist(awkward().plist())
	if err != nil {
		t.Fatal(err)
	}
	for key, value := range got.(map[string]any) {
		kind := map[string]string{"string": "string", "bool": "bool", "int": "integer", "[]interface {}": "array", "map[string]interface {}": "dict"}[fmt.Sprintf("%T", value)]
		if launchdKeys[key] != kind {
			t.Errorf("%s is of type %s, not %q", key, kind, launchdKeys[key])
		}
	}
}

func TestWhatIsNoPlistIsFound(t *testing.T) {
	t.Parallel()
	whole := plainUnit().plist()
	for _, change := range [][2]string{
		{"<true/>", "<yes/>"},
		{"<key>Label</key>", "<key>RunAtLoad</key>"},
		{"<key>Label</key>\n", ""},
		{"\t<string>choiros.agent</string>\n", ""},
		{"<integer>30</integer>", "<integer>soon</integer>"},
		{"<integer>30</integer>", "<string>"},
		{`<plist version="1.0">`, "<plist>"},
		{"DTD PLIST 1.0", "DTD HTML 4.0"},
		{"</plist>", "</plist><plist/>"},
		{"<dict>", "text<dict>"},
		{`encoding="UTF-8"`, `encoding="latin1"`},
	} {
		broken := strings.Replace(whole, change[0], change[1], 1)
		if broken == whole {
			t.Fatalf("%s is not in it", change[0])
		}
		if _, err := parsePlist(broken); err == nil {
			t.Errorf("%q for %q is not found", change[1], change[0])
		}
	}
}

// parsePlist reads a property list as strictly as plutil -lint: the declaration
// and the DOCTYPE, one plist of version 1.0 with one value in it, known
// elements alone, and in a dict keys, each once and each with a value.
func parsePlist(text string) (any, error) {
	const doctype = `DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd"`
	p := &plistParser{xml.NewDecoder(strings.NewReader(text))}
	declared, typed := false, false
	for {
		token, err := p.next()
		if err != nil {
			return nil, err
		}
		switch t := token.(type) {
		case xml.ProcInst:
			declared = t.Target == "xml" && strings.Contains(string(t.Inst), `encoding="UTF-8"`)
		case xml.Directive:
			typed = string(t) == doctype
		case xml.StartElement:
			if !declared || !typed || t.Name.Local != "plist" || len(t.Attr) != 1 || t.Attr[0].Name.Local != "version" || t.Attr[0].Value != "1.0" {
				return nil, errors.New("no plist of version 1.0 with its DOCTYPE")
			}
			value, end, err := p.value()
			if err == nil && end {
				err = errors.New("an empty plist")
			}
			if err == nil {
				err = p.end()
			}
			if err != nil {
				return nil, err
			}
			if token, err := p.next(); !errors.Is(err, io.EOF) {
				return nil, fmt.Errorf("%v after the plist", token)
			}
			return value, nil
		default:
			return nil, fmt.Errorf("unexpected %T", token)
		}
	}
}

type plistParser struct{ *xml.Decoder }

// next skips comments and white space.
func (p *plistParser) next() (xml.Token, error) {
	for {
		token, err := p.Token()
		if err != nil {
			return nil, err
		}
		switch t := token.(type) {
		case xml.Comment:
			continue
		case xml.CharData:
			if strings.TrimSpace(string(t)) == "" {
				continue
			}
		}
		return token, nil
	}
}

func (p *plistParser) end() error {
	token, err := p.next()
	if _, ok := token.(xml.EndElement); err == nil && !ok {
		err = fmt.Errorf("%v instead of an end", token)
	}
	return err
}

// value reads one value, or the end of what it would be in.
func (p *plistParser) value() (_ any, end bool, err error) {
	token, err := p.next()
	if err != nil {
		return nil, false, err
	}
	if _, ok := token.(xml.EndElement); ok {
		return nil, true, nil
	}
	start, ok := token.(xml.StartElement)
	if !ok || len(start.Attr) > 0 {
		return nil, false, fmt.Errorf("%v is no value", token)
	}
	switch start.Name.Local {
	case "true", "false":
		return start.Name.Local == "true", false, p.end()
	case "string", "integer":
		text, err := p.text()
		if err != nil || start.Name.Local == "string" {
			return text, false, err
		}
		n, err := strconv.Atoi(text)
		return n, false, err
	case "array":
		list := []any{}
		for {
			v, end, err := p.value()
			if err != nil || end {
				return list, false, err
			}
			list = append(list, v)
		}
	case "dict":
		dict, err := p.dict()
		return dict, false, err
	}
	return nil, false, fmt.Errorf("unknown element %s", start.Name.Local)
}

func (p *plistParser) dict() (map[string]any, error) {
	dict := map[string]any{}
	for {
		token, err := p.next()
		if err != nil {
			return nil, err
		}
		if _, ok := token.(xml.EndElement); ok {
			return dict, nil
		}
		if start, ok := token.(xml.StartElement); !ok || start.Name.Local != "key" {
			return nil, fmt.Errorf("%v is no key", token)
		}
		key, err := p.text()
		if err != nil {
			return nil, err
		}
		if _, twice := dict[key]; twice {
			return nil, fmt.Errorf("%s is there twice", key)
		}
		v, end, err := p.value()
		if err == nil && end {
			err = errors.New("no value")
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		dict[key] = v
	}
}

// text reads to the end of an element that has text alone.
func (p *plistParser) text() (string, error) {
	var b strings.Builder
	for {
		token, err := p.Token()
		if err != nil {
			return "", err
		}
		switch t := token.(type) {
		case xml.CharData:
			b.Write(t)
		case xml.EndElement:
			return b.String(), nil
		default:
			return "", fmt.Errorf("%v among text", token)
		}
	}
}

func TestJobStates(t *testing.T) {
	t.Parallel()
	const running = `gui/501/choiros.agent = {
	active count = 1
	path = /Users/ada/Library/LaunchAgents/choiros.agent.plist
	state = running

	program = /usr/local/bin/agent
	default environment = {
		PATH => /usr/bin:/bin:/usr/sbin:/sbin
		pid = 1
	}
	pid = 4242
	last exit code = (never exited)
}
`
	for text, want := range map[string]serviceState{
		running: {running: true, pid: 4242},
		"x = {\n\tstate = spawn scheduled\n\tlast exit code = 78: EX_CONFIG\n}\n":                        {ended: "exit status 78"},
		"x = {\n\tstate = not running\n\tlast exit code = 0\n\tlast terminating signal = Killed: 9\n}\n": {ended: "signal Killed: 9"},
		"": {running: true}, // a form that is not known tells nothing
	} {
		var got serviceState
		jobState(text, &got)
		if got != want {
			t.Errorf("%s: %+v, want %+v", text, got, want)
		}
	}
	for text, want := range map[string]bool{
		"\t\"choiros.agent\" => disabled\n": true, "\t\"choiros.agent\" => true\n": true,
		"\t\"choiros.agent\" => enabled\n": false, "\t\"org.choiros.agent\" => disabled\n": false, "": false,
	} {
		if got := isDisabled(text); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestUnitStates(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]serviceState{
		"LoadState=loaded\nActiveState=active\nMainPID=77\nUnitFileState=enabled\nResult=success\nExecMainStatus=0\n":           {running: true, pid: 77, atLogin: true},
		"LoadState=loaded\nActiveState=activating\nMainPID=0\nUnitFileState=disabled\nResult=exit-code\nExecMainStatus=2\n":     {ended: "exit-code, status 2"},
		"LoadState=masked\nActiveState=inactive\nMainPID=0\nUnitFileState=masked\n":                                             {ended: "masked"},
		"LoadState=not-found\nActiveState=inactive\nMainPID=0\nUnitFileState=\nResult=success\n":                                {},
		"LoadState=loaded\nActiveState=deactivating\nMainPID=5\nUnitFileState=enabled-runtime\nResult=signal\nExecMainStatus=9": {running: true, pid: 5, atLogin: true, ended: "signal, status 9"},
	} {
		if got := unitState(text); got != want {
			t.Errorf("%s: %+v, want %+v", text, got, want)
		}
	}
}
