package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/choiros/agent/internal/sandbox"
)

// fileError is something wrong in a file. It wraps ErrInvalid.
type fileError struct {
	file    string
	line    int    // zero: the file as a whole
	key     string // workspace.path; empty: the file as a whole
	problem string
}

func (e *fileError) Error() string {
	place := e.file
	if e.line > 0 {
		place += fmt.Sprintf(":%d", e.line)
	}
	if e.key != "" {
		place += ": " + e.key
	}
	return place + ": " + e.problem
}

func (e *fileError) Unwrap() error { return sandbox.ErrInvalid }

// reader reads a YAML tree strictly. It decodes nodes by hand: only so can
// each error name its line, and a value like 1.10 or on be taken as written.
type reader struct{ file string }

// parse reads the one document of a file. An empty file is nil.
func (r reader) parse(data []byte) (*yaml.Node, error) {
	decoder := yaml.NewDecoder(strings.NewReader(string(data)))
	var document, more yaml.Node
	if err := decoder.Decode(&document); errors.Is(err, io.EOF) {
		return nil, nil
	} else if err != nil {
		return nil, &fileError{file: r.file, problem: strings.TrimPrefix(err.Error(), "yaml: ")}
	}
	if err := decoder.Decode(&more); !errors.Is(err, io.EOF) {
		return nil, &fileError{file: r.file, line: more.Line, problem: "has a second document; one file describes one sandbox"}
	}
	root := document.Content[0]
	if err := r.refuseAliases(root); err != nil {
		return nil, err
	}
	if root.ShortTag() == "!!null" {
		return nil, nil
	}
	return root, nil
}

// refuseAliases keeps a small file from standing for a huge one.
func (r reader) refuseAliases(n *yaml.Node) error {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		return r.errorf(n, "", "anchors and aliases are not supported")
	}
	for _, child := range n.Content {
		if err := r.refuseAliases(child); err != nil {
			return err
		}
	}
	return nil
}

func (r reader) errorf(n *yaml.Node, key, format string, args ...any) error {
	return &fileError{file: r.file, line: n.Line, key: key, problem: fmt.Sprintf(format, args...)}
}

// at gives a problem its place, unless it has one.
func (r reader) at(n *yaml.Node, key string, err error) error {
	if _, ok := errors.AsType[*fileError](err); err == nil || ok {
		return err
	}
	return r.errorf(n, key, "%s", err)
}

// fields reads a mapping whose keys are known.
func (r reader) fields(n *yaml.Node, path string, known map[string]func(n *yaml.Node, key string) error) error {
	return r.entries(n, path, func(name string, key, value *yaml.Node) error {
		read, ok := known[name]
		if !ok {
			problem := "unknown key"
			if near := nearest(name, slices.Sorted(maps.Keys(known))); near != "" {
				problem += fmt.Sprintf("; did you mean %s?", near)
			}
			return r.errorf(key, join(path, name), "%s", problem)
		}
		return read(value, join(path, name))
	})
}

// entries calls read for each key of a mapping, in order.
func (r reader) entries(n *yaml.Node, path string, read func(name string, key, value *yaml.Node) error) error {
	if n.Kind != yaml.MappingNode {
		return r.errorf(n, path, "is %s; write it as key: value lines", kindOf(n))
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode {
			return r.errorf(key, path, "has a key that is %s", kindOf(key))
		}
		name := key.Value
		if seen[name] {
			return r.errorf(key, join(path, name), "is given twice")
		}
		seen[name] = true
		if err := read(name, key, value); err != nil {
			return r.at(value, join(path, name), err)
		}
	}
	return nil
}

// items calls read for each item of a list, or for n alone if it is none.
func (r reader) items(n *yaml.Node, path string, read func(n *yaml.Node, path string) error) error {
	if n.Kind != yaml.SequenceNode {
		return r.at(n, path, read(n, path))
	}
	for i, item := range n.Content {
		name := fmt.Sprintf("%s[%d]", path, i)
		if err := r.at(item, name, read(item, name)); err != nil {
			return err
		}
	}
	return nil
}

// text reads a scalar as it is written, whatever YAML takes it for.
func (r reader) text(n *yaml.Node, path string) (string, error) {
	if n.Kind != yaml.ScalarNode {
		return "", r.errorf(n, path, "is %s; write a single value", kindOf(n))
	}
	if n.ShortTag() == "!!null" {
		return "", r.errorf(n, path, "has no value")
	}
	return n.Value, nil
}

// truth reads true or false.
func (r reader) truth(n *yaml.Node, path string) (bool, error) {
	var b bool
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" || n.Decode(&b) != nil {
		return false, r.errorf(n, path, "is neither true nor false")
	}
	return b, nil
}

// parsed returns a field that is a scalar which parse reads and set keeps.
func parsed[T any](r reader, parse func(string) (T, error), set func(T)) func(*yaml.Node, string) error {
	return func(n *yaml.Node, path string) error {
		s, err := r.text(n, path)
		if err != nil {
			return err
		}
		v, err := parse(s)
		if err != nil {
			return r.at(n, path, err)
		}
		set(v)
		return nil
	}
}

// nonEmpty is the parse function of plain text.
func nonEmpty(s string) (string, error) {
	if s == "" {
		return "", errors.New("is empty")
	}
	return s, nil
}

// flag returns a field that is true or false.
func (r reader) flag(to *bool) func(*yaml.Node, string) error {
	return func(n *yaml.Node, path string) (err error) {
		*to, err = r.truth(n, path)
		return err
	}
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func kindOf(n *yaml.Node) string {
	switch n.Kind {
	case yaml.SequenceNode:
		return "a list"
	case yaml.MappingNode:
		return "a mapping"
	}
	if n.ShortTag() == "!!null" {
		return "empty"
	}
	return "a single value"
}

// nearest is the one of names that s is most likely a slip for, or empty.
func nearest(s string, names []string) string {
	best, least := "", 3
	for _, name := range names {
		if d := distance(strings.ToLower(s), name); d < least && d < len(name) {
			best, least = name, d
		}
	}
	return best
}

// distance is Levenshtein's: how many letters to add, drop or change.
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
