package main

import (
	"fmt"
	"math"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

// parsePort reads [[BIND:]HOST:]GUEST[/tcp|/udp], with an IPv6 address in
// brackets.
func parsePort(s string) (*agentv1.Port, error) {
	problem := fmt.Errorf("%q is not of the form [[BIND:]HOST:]GUEST[/tcp|udp]", s)
	numbers, protocol, hasProtocol := strings.Cut(s, "/")
	if !hasProtocol {
		protocol = "tcp"
	}
	p := &agentv1.Port{}
	var err error
	if p.Protocol, err = parseProtocol(protocol); err != nil {
		return nil, problem
	}
	if bind, rest, found := cutBind(numbers); found {
		if _, err := netip.ParseAddr(bind); err != nil {
			return nil, fmt.Errorf("%q: %q is not an IP address", s, bind)
		}
		p.BindAddress, numbers = bind, rest
		if !strings.Contains(numbers, ":") {
			return nil, problem
		}
	}
	host, guest, found := strings.Cut(numbers, ":")
	if !found {
		host, guest = "0", numbers
	}
	if p.HostPort, err = parsePortNumber(host, 0); err != nil {
		return nil, fmt.Errorf("%q: %w", s, err)
	}
	if p.GuestPort, err = parsePortNumber(guest, 1); err != nil {
		return nil, fmt.Errorf("%q: %w", s, err)
	}
	return p, nil
}

// cutBind takes the address to listen on off BIND:HOST:GUEST.
func cutBind(s string) (bind, rest string, found bool) {
	if after, ok := strings.CutPrefix(s, "["); ok {
		return strings.Cut(after, "]:")
	}
	if strings.Count(s, ":") == 2 {
		return strings.Cut(s, ":")
	}
	return "", s, false
}

func parseProtocol(s string) (agentv1.Protocol, error) {
	switch s {
	case "tcp":
		return agentv1.Protocol_PROTOCOL_TCP, nil
	case "udp":
		return agentv1.Protocol_PROTOCOL_UDP, nil
	}
	return 0, fmt.Errorf("%q is neither tcp nor udp", s)
}

func parsePortNumber(s string, low uint64) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n < low {
		return 0, fmt.Errorf("%q is not a port from %d to %d", s, low, math.MaxUint16)
	}
	return uint32(n), nil
}

// parseSecret reads NAME=SOURCE[,file][,optional]. The source is not echoed in
// errors: it may be a value that someone pasted by mistake.
func parseSecret(s string, p paths) (*agentv1.SecretRef, error) {
	name, source, found := strings.Cut(s, "=")
	if !found || name == "" || source == "" {
		return nil, fmt.Errorf("is not of the form NAME=SOURCE[,file][,optional]")
	}
	ref := &agentv1.SecretRef{Name: name}
	for {
		if rest, ok := strings.CutSuffix(source, ",file"); ok {
			source, ref.File = rest, true
		} else if rest, ok := strings.CutSuffix(source, ",optional"); ok {
			source, ref.Optional = rest, true
		} else {
			break
		}
	}
	var err error
	ref.Source, err = p.secretSource(source)
	return ref, err
}

// secretSource resolves the path in a source that has one.
func (p paths) secretSource(s string) (string, error) {
	scheme, rest, found := strings.Cut(s, ":")
	if !found || rest == "" {
		return "", fmt.Errorf("names no source: write env-file:PATH, file:PATH, credential:NAME, …")
	}
	switch scheme {
	case "env-file", "file", "age":
		path, err := p.resolve(rest)
		return scheme + ":" + path, err
	case "sops":
		file, key, hasKey := strings.Cut(rest, "#")
		path, err := p.resolve(file)
		if hasKey {
			path += "#" + key
		}
		return scheme + ":" + path, err
	}
	return s, nil // the agent knows which others there are
}

// parseIdle reads DURATION[:stop|hibernate], or off.
func parseIdle(s string) (*agentv1.IdlePolicy, error) {
	if s == "off" || s == "never" {
		return &agentv1.IdlePolicy{}, nil
	}
	text, action, hasAction := strings.Cut(s, ":")
	d, err := parseDuration(text)
	if err != nil {
		return nil, err
	}
	idle := &agentv1.IdlePolicy{Timeout: durationpb.New(d), Action: agentv1.IdlePolicy_ACTION_STOP}
	if hasAction {
		idle.Action, err = parseIdleAction(action)
	}
	return idle, err
}

func parseIdleAction(s string) (agentv1.IdlePolicy_Action, error) {
	switch s {
	case "stop":
		return agentv1.IdlePolicy_ACTION_STOP, nil
	case "hibernate":
		return agentv1.IdlePolicy_ACTION_HIBERNATE, nil
	}
	return 0, fmt.Errorf("%q is neither stop nor hibernate", s)
}

// parseRestart reads never, on-failure[:N] or always[:N].
func parseRestart(s string) (*agentv1.RestartPolicy, error) {
	mode, count, hasCount := strings.Cut(s, ":")
	r := &agentv1.RestartPolicy{}
	var err error
	if r.Mode, err = parseRestartMode(mode); err != nil {
		return nil, err
	}
	if hasCount {
		if r.Mode == agentv1.RestartPolicy_MODE_NEVER {
			return nil, fmt.Errorf("%q: never takes no number", s)
		}
		if r.MaxRetries, err = parseCount(count); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func parseRestartMode(s string) (agentv1.RestartPolicy_Mode, error) {
	switch s {
	case "never":
		return agentv1.RestartPolicy_MODE_NEVER, nil
	case "on-failure":
		return agentv1.RestartPolicy_MODE_ON_FAILURE, nil
	case "always":
		return agentv1.RestartPolicy_MODE_ALWAYS, nil
	}
	return 0, fmt.Errorf("%q is none of never, on-failure and always", s)
}

// parseHTTP reads PORT[/PATH].
func parseHTTP(s string) (*agentv1.HttpProbe, error) {
	number, path, _ := strings.Cut(s, "/")
	port, err := parsePortNumber(number, 1)
	if err != nil {
		return nil, fmt.Errorf("%q is not of the form PORT[/PATH]", s)
	}
	return &agentv1.HttpProbe{Port: port, Path: "/" + path}, nil
}

// parseWords splits a command into words at spaces, as a shell does with
// quotes and backslashes but with nothing else: no variables, no globs.
func parseWords(s string) ([]string, error) {
	var words []string
	var word strings.Builder
	inWord, quote := false, rune(0)
	runes := []rune(s)
	for i := 0; i < len(runes); i++ {
		r := runes[i]
		switch {
		case r == '\\' && quote != '\'':
			if i++; i == len(runes) {
				return nil, fmt.Errorf("%q ends in a backslash", s)
			}
			word.WriteRune(runes[i])
			inWord = true
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(r)
		case r == '\'' || r == '"':
			quote, inWord = r, true
		case r == ' ' || r == '\t' || r == '\n':
			if inWord {
				words = append(words, word.String())
				word.Reset()
			}
			inWord = false
		default:
			word.WriteRune(r)
			inWord = true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("%q has a quote that does not end", s)
	}
	if inWord {
		words = append(words, word.String())
	}
	if len(words) == 0 {
		return nil, fmt.Errorf("is empty")
	}
	return words, nil
}

func positive(s string) (*durationpb.Duration, error) {
	d, err := parseDuration(s)
	if err != nil {
		return nil, err
	}
	if d < time.Millisecond {
		return nil, fmt.Errorf("%q is too short", s)
	}
	return durationpb.New(d), nil
}

// folderName makes a sandbox's name of a folder's: lower case, with - for what
// a name cannot have. It may be empty.
func folderName(folder string) string {
	var b strings.Builder
	for _, r := range strings.ToLower(filepath.Base(folder)) {
		switch {
		case r >= 'a' && r <= 'z' || r >= '0' && r <= '9':
			b.WriteRune(r)
		case b.Len() > 0 && !strings.HasSuffix(b.String(), "-"):
			b.WriteByte('-')
		}
	}
	name := b.String()
	return strings.TrimRight(name[:min(len(name), 63)], "-")
}

// parseRotation reads leave, signal[:SIGNAL] or restart.
func parseRotation(s string) (*agentv1.SecretRotation, error) {
	action, signal, hasSignal := strings.Cut(s, ":")
	r := &agentv1.SecretRotation{}
	var err error
	if r.Action, err = parseRotationAction(action); err != nil {
		return nil, err
	}
	if hasSignal {
		if r.Action != agentv1.SecretRotation_ACTION_SIGNAL {
			return nil, fmt.Errorf("%q: %s takes no signal", s, action)
		}
		r.Signal, err = parseSignal(signal)
	}
	return r, err
}

func parseRotationAction(s string) (agentv1.SecretRotation_Action, error) {
	switch s {
	case "leave":
		return agentv1.SecretRotation_ACTION_LEAVE, nil
	case "signal":
		return agentv1.SecretRotation_ACTION_SIGNAL, nil
	case "restart":
		return agentv1.SecretRotation_ACTION_RESTART, nil
	}
	return 0, fmt.Errorf("%q is none of leave, signal and restart", s)
}

// parseSignal checks a signal's name or number.
func parseSignal(s string) (string, error) {
	if _, err := sandbox.ParseSignal("", s); err != nil {
		return "", fmt.Errorf("%q is not a signal; write HUP, or a number from 1 to 64", s)
	}
	return s, nil
}

func parseAutoForward(s string) (agentv1.AutoForward_Mode, error) {
	switch s {
	case "off":
		return agentv1.AutoForward_MODE_OFF, nil
	case "offer":
		return agentv1.AutoForward_MODE_OFFER, nil
	case "forward":
		return agentv1.AutoForward_MODE_FORWARD, nil
	}
	return 0, fmt.Errorf("%q is none of off, offer and forward", s)
}
