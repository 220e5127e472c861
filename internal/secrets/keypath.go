package secrets

import (
	"encoding/json"
	"errors"
	"strconv"
	"strings"
)

// errKeyPath says what a key path looks like; it does not echo one.
var errKeyPath = errors.New(`has a key path that is neither a.b.0 nor ["a"]["b"][0]`)

const maxKeyDepth = 32

// parseKeyPath reads the way to a value in a structured file: names and, for
// lists, numbers counted from zero. It is either dotted, a.b.0, or in the
// form of sops --extract, ["a"]["b"][0], for names that hold dots. The result
// has strings, and ints where the bracketed form had a bare number; the
// dotted form has strings alone, and a list takes one that is a number.
func parseKeyPath(text string) ([]any, error) {
	if strings.HasPrefix(text, "[") {
		return parseBrackets(text)
	}
	names := strings.Split(text, ".")
	if len(names) > maxKeyDepth {
		return nil, errKeyPath
	}
	var keys []any
	for _, name := range names {
		if name == "" {
			return nil, errKeyPath
		}
		keys = append(keys, name)
	}
	return keys, nil
}

func parseBrackets(text string) ([]any, error) {
	var keys []any
	for text != "" {
		if text[0] != '[' || len(keys) == maxKeyDepth {
			return nil, errKeyPath
		}
		var key any
		var ok bool
		key, text, ok = cutBracket(text[1:])
		if !ok {
			return nil, errKeyPath
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// cutBracket reads what follows a [, up to and with its ].
func cutBracket(text string) (key any, rest string, ok bool) {
	if !strings.HasPrefix(text, `"`) {
		digits, rest, found := strings.Cut(text, "]")
		n, valid := index(digits)
		return n, rest, found && valid
	}
	quoted, err := strconv.QuotedPrefix(text)
	if err != nil {
		return nil, "", false
	}
	rest, found := strings.CutPrefix(text[len(quoted):], "]")
	var name string
	if err := json.Unmarshal([]byte(quoted), &name); err != nil || name == "" {
		return nil, "", false
	}
	return name, rest, found
}

// index reads a place in a list.
func index(digits string) (int, bool) {
	if digits == "" || len(digits) > 6 || strings.Trim(digits, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.Atoi(digits)
	return n, err == nil
}
