package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"

	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

// maxFile is far more than any configuration needs.
const maxFile = 1 << 20

// readConfig reads a file over what cfg holds, and reports whether there was
// one. A file that does not exist is an error only if it was asked for.
func readConfig(cfg *Config, path string, asked bool) (found bool, err error) {
	if path == "" {
		return false, nil
	}
	text, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) && !asked {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var known []string
	for _, k := range cfg.keys() {
		known = append(known, k.path)
	}
	return true, decode(path, text, cfg, func(key string) (closest string, ok bool) {
		for _, k := range known {
			if key == k || strings.HasPrefix(k, key+".") {
				return "", true
			}
		}
		return closestTo(key, known), false
	})
}

func readFile(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if info.Size() > maxFile {
		return "", fmt.Errorf("%s: is longer than %d bytes", path, maxFile)
	}
	data, err := os.ReadFile(path)
	return string(data), err
}

// decode reads TOML strictly: isKnown tells which keys there are, and for
// another one which it may have been meant for.
func decode(path, text string, into any, isKnown func(key string) (closest string, ok bool)) error {
	meta, err := toml.Decode(text, into)
	if err != nil {
		if syntax, ok := errors.AsType[toml.ParseError](err); ok {
			where := fmt.Sprintf("%s:%d", path, syntax.Position.Line)
			if syntax.LastKey != "" {
				where += ": " + syntax.LastKey
			}
			return fmt.Errorf("%s: %s", where, syntax.Message)
		}
		return fmt.Errorf("%s: %w", path, err)
	}
	var unknown []error
	var parents []string
	for _, key := range meta.Keys() {
		name := key.String()
		if slices.ContainsFunc(parents, func(p string) bool { return strings.HasPrefix(name, p) }) {
			continue // its table was reported
		}
		closest, ok := isKnown(name)
		switch {
		case ok:
		case closest != "":
			unknown = append(unknown, fmt.Errorf("%s: unknown key %s; did you mean %s?", path, name, closest))
		default:
			unknown = append(unknown, fmt.Errorf("%s: unknown key %s", path, name))
		}
		if !ok {
			parents = append(parents, name+".")
		}
	}
	return errors.Join(unknown...)
}

// closestTo finds the candidate that a misspelt word was meant for, or none.
func closestTo(word string, candidates []string) string {
	best, least := "", len(word)/3+1
	for _, candidate := range candidates {
		// The right key in the wrong table is the likeliest mistake of all.
		if last := candidate[strings.LastIndex(candidate, ".")+1:]; last == word[strings.LastIndex(word, ".")+1:] {
			return candidate
		}
		// memory is memory_mib.
		if strings.HasPrefix(candidate, word+"_") {
			return candidate
		}
		if d := distance(word, candidate); d < least {
			best, least = candidate, d
		}
	}
	return best
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(diagonal+cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// classRow is a row of the table of machine classes as the file has it.
type classRow struct {
	Driver    string `toml:"driver"`
	CPUMillis uint32 `toml:"cpu_millis"`
	MemoryMiB uint64 `toml:"memory_mib"`
	Pids      uint32 `toml:"pids"`
}

// readClasses reads the table of machine classes. An empty path is an empty
// table.
func readClasses(path string) (map[string]manager.Class, error) {
	if path == "" {
		return nil, nil
	}
	text, err := readFile(path)
	if err != nil {
		return nil, err
	}
	var file struct {
		Class map[string]classRow `toml:"class"`
	}
	columns := []string{"driver", "cpu_millis", "memory_mib", "pids"}
	err = decode(path, text, &file, func(name string) (string, bool) {
		parts := strings.Split(name, ".")
		switch {
		case parts[0] != "class":
			return "class.NAME", false
		case len(parts) < 3:
			return "", true
		case len(parts) == 3 && slices.Contains(columns, parts[2]):
			return "", true
		default:
			column := closestTo(parts[len(parts)-1], columns)
			if column == "" {
				return "", false
			}
			return strings.Join([]string{"class", parts[1], column}, "."), false
		}
	})
	if err != nil {
		return nil, err
	}
	classes := make(map[string]manager.Class, len(file.Class))
	for name, row := range file.Class {
		class := manager.Class{
			Driver:    row.Driver,
			Resources: sandbox.Resources{CPUMillis: row.CPUMillis, MemoryMiB: row.MemoryMiB, Pids: row.Pids},
		}
		if err := checkClass(name, class); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		classes[name] = class
	}
	return classes, nil
}

// checkClass holds a class to the bounds of a spec.
func checkClass(name string, class manager.Class) error {
	if err := sandbox.ValidateName("class", name); err != nil {
		return err
	}
	spec := sandbox.Spec{Image: "any", Resources: class.Resources}
	err := spec.Validate()
	if field, ok := errors.AsType[*sandbox.FieldError](err); ok {
		return fmt.Errorf("class.%s.%s: %s", name, strings.TrimPrefix(field.Field, "spec.resources."), field.Problem)
	}
	return err
}
