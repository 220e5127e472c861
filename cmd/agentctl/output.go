package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// forPrograms reports whether output is for programs to read.
func (a *app) forPrograms() bool { return a.output == "json" || a.output == "yaml" }

// print writes one value in the format chosen for programs: a protobuf
// message, anything encoding/json takes, or a []any of these as an array.
func (a *app) print(value any) error {
	data, err := toJSON(value)
	if err != nil {
		return err
	}
	if a.output == "yaml" {
		return writeYAML(a.stdout, data)
	}
	var b bytes.Buffer
	if err := json.Indent(&b, data, "", "  "); err != nil {
		return err
	}
	b.WriteByte('\n')
	_, err = a.stdout.Write(b.Bytes())
	return err
}

// printEvent writes one value of a stream: a line of JSON, or a YAML document.
func (a *app) printEvent(value any) error {
	data, err := toJSON(value)
	if err != nil {
		return err
	}
	if a.output == "yaml" {
		if _, err := io.WriteString(a.stdout, "---\n"); err != nil {
			return err
		}
		return writeYAML(a.stdout, data)
	}
	_, err = a.stdout.Write(append(data, '\n'))
	return err
}

// messages makes a slice of messages one that print takes.
func messages[M proto.Message](list []M) []any {
	out := make([]any, len(list))
	for i, m := range list {
		out[i] = m
	}
	return out
}

// toJSON returns compact JSON. Messages follow the protobuf JSON mapping with
// the proto files' field names; protojson itself varies its white space on
// purpose, so it is taken out.
func toJSON(value any) ([]byte, error) {
	switch v := value.(type) {
	case proto.Message:
		data, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(v)
		if err != nil {
			return nil, fmt.Errorf("print %s: %w", v.ProtoReflect().Descriptor().Name(), err)
		}
		var b bytes.Buffer
		err = json.Compact(&b, data)
		return b.Bytes(), err
	case []any:
		var b bytes.Buffer
		b.WriteByte('[')
		for i, m := range v {
			if i > 0 {
				b.WriteByte(',')
			}
			data, err := toJSON(m)
			if err != nil {
				return nil, err
			}
			b.Write(data)
		}
		b.WriteByte(']')
		return b.Bytes(), nil
	default:
		return json.Marshal(value)
	}
}

// writeYAML writes JSON, which is YAML already, the way people write YAML,
// keeping the order of its keys.
func writeYAML(w io.Writer, data []byte) error {
	var node yaml.Node
	if err := yaml.Unmarshal(data, &node); err != nil {
		return err
	}
	plainStyle(&node)
	encoder := yaml.NewEncoder(w)
	encoder.SetIndent(2)
	if err := encoder.Encode(&node); err != nil {
		return err
	}
	return encoder.Close()
}

// plainStyle takes brackets away, and the quotes of text that no reader takes
// for anything else. Many still read YAML 1.1, to which on, 1:20 and 2001-01-01
// are a truth, a number and a date; https://yaml.org/type/.
func plainStyle(node *yaml.Node) {
	if len(node.Content) > 0 || node.Kind == yaml.ScalarNode && !ambiguous(node) {
		node.Style = 0
	}
	for _, child := range node.Content {
		plainStyle(child)
	}
}

func ambiguous(node *yaml.Node) bool {
	if node.Style&yaml.DoubleQuotedStyle == 0 {
		return false // not text
	}
	switch strings.ToLower(node.Value) {
	case "", "y", "n", "yes", "no", "on", "off", "true", "false", "null", "~", "<<", "=":
		return true
	}
	return strings.ContainsAny(node.Value[:1], "0123456789+-.")
}
