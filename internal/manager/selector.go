package manager

import (
	"strings"

	"github.com/choiros/agent/internal/sandbox"
)

// Selector selects sandboxes by their labels. The zero Selector selects all.
type Selector struct{ requirements []requirement }

type requirement struct {
	key, value string
	hasValue   bool // compare the value, not only presence
	negated    bool
}

// ParseSelector reads comma-separated requirements, which must all hold:
// key=value, key!=value, key, !key. A key that is absent is unlike any value.
func ParseSelector(text string) (Selector, error) {
	var sel Selector
	if strings.TrimSpace(text) == "" {
		return sel, nil
	}
	if len(text) > 4096 {
		return sel, sandbox.Invalidf("label_selector", "is longer than 4096 bytes")
	}
	for part := range strings.SplitSeq(text, ",") {
		part = strings.TrimSpace(part)
		var req requirement
		key, value, found := strings.Cut(part, "=")
		if found {
			req.hasValue = true
			req.value = strings.TrimSpace(strings.TrimPrefix(value, "="))
			key, req.negated = strings.CutSuffix(key, "!")
		} else {
			key, req.negated = strings.CutPrefix(part, "!")
		}
		req.key = strings.TrimSpace(key)
		if err := sandbox.ValidateLabels("label_selector", map[string]string{req.key: req.value}); err != nil {
			return Selector{}, sandbox.Invalidf("label_selector",
				"%q is none of key=value, key!=value, key and !key", part)
		}
		sel.requirements = append(sel.requirements, req)
	}
	return sel, nil
}

// Matches reports whether labels meet every requirement.
func (s Selector) Matches(labels map[string]string) bool {
	for _, req := range s.requirements {
		value, present := labels[req.key]
		holds := present && (!req.hasValue || value == req.value)
		if holds == req.negated {
			return false
		}
	}
	return true
}
