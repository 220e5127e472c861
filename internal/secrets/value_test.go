package secrets

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"
)

const canary = "c4n4ry-v4lu3-0f-s3cr3t"

type holder struct {
	hidden  Value
	pointer *Value
	list    []Value
	table   map[string]Value
	any     any
	nested  struct{ deep struct{ value Value } }
}

func newHolder() holder {
	v := NewValue([]byte(canary))
	h := holder{hidden: v, pointer: &v, list: []Value{v}, table: map[string]Value{"k": v}, any: v}
	h.nested.deep.value = v
	return h
}

func TestValueIsNotPrinted(t *testing.T) {
	t.Parallel()
	v, h := NewValue([]byte(canary)), newHolder()
	item := Item{Name: "N", Value: v}
	holders := map[string]any{
		"value": v, "pointer": &v, "slice": []Value{v}, "array": [1]Value{v}, "map": map[string]Value{"k": v},
		"unexported fields": h, "pointer to them": &h, "item": item, "set": Set{Items: []Item{item}}, "any": []any{v, &v, h},
	}
	forms := [][]byte{[]byte(canary), fmt.Appendf(nil, "%x", canary), fmt.Appendf(nil, "%X", canary), fmt.Append(nil, []byte(canary)[:8])}
	for name, held := range holders {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%o", "%T", "%p", "%c", "%U", "%10.3s"} {
			text := fmt.Sprintf(verb, held)
			for _, form := range forms {
				if strings.Contains(text, strings.Trim(string(form), "[]")) {
					t.Errorf("%s of %s shows the value: %s", verb, name, text)
				}
			}
		}
	}
}

func TestValueReadsSecret(t *testing.T) {
	t.Parallel()
	v := NewValue([]byte(canary))
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d", "%10s"} {
		if got := fmt.Sprintf(verb, v); got != redacted {
			t.Errorf("%s: %q", verb, got)
		}
		if got := fmt.Sprintf(verb, &v); got != redacted {
			t.Errorf("%s of a pointer: %q", verb, got)
		}
		if got := fmt.Sprintf(verb, Value{}); got != redacted {
			t.Errorf("%s of an empty one: %q", verb, got)
		}
	}
	if got := fmt.Sprint(struct{ V Value }{v}); got != "{"+redacted+"}" {
		t.Errorf("in a struct: %q", got)
	}
}

func TestValueIsNotEncoded(t *testing.T) {
	t.Parallel()
	v := NewValue([]byte(canary))
	type named struct{ Value Value }
	held := named{v}
	var logged bytes.Buffer
	logger := slog.New(slog.NewJSONHandler(&logged, nil))
	logger.Info("m", "value", v, "held", held, "holder", fmt.Sprint(newHolder()), slog.Group("g", "v", &v))
	slog.New(slog.NewTextHandler(&logged, nil)).Info("m", "value", v, "held", held)
	j, jsonErr := json.Marshal(map[string]any{"v": v, "held": held, "list": []Value{v}})
	x, xmlErr := xml.Marshal(held)
	if jsonErr != nil || xmlErr != nil {
		t.Fatal(jsonErr, xmlErr)
	}
	for name, text := range map[string]string{"slog": logged.String(), "json": string(j), "xml": string(x)} {
		if strings.Contains(text, canary) || !strings.Contains(text, redacted) {
			t.Errorf("%s: %s", name, text)
		}
	}
}

// TestValueIsNotDumped walks everything that reflection reaches, unexported
// or not, as dumpers do.
func TestValueIsNotDumped(t *testing.T) {
	t.Parallel()
	var found bool
	var walk func(v reflect.Value, depth int)
	walk = func(v reflect.Value, depth int) {
		if depth > 12 {
			return
		}
		switch v.Kind() {
		case reflect.Pointer, reflect.Interface:
			if !v.IsNil() {
				walk(v.Elem(), depth+1)
			}
		case reflect.Struct:
			for _, field := range v.Fields() {
				walk(field, depth+1)
			}
		case reflect.Slice, reflect.Array:
			if v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Uint8 && bytes.Contains(v.Bytes(), []byte(canary)) {
				found = true
			}
			for i := range v.Len() {
				walk(v.Index(i), depth+1)
			}
		case reflect.Map:
			for _, key := range v.MapKeys() {
				walk(v.MapIndex(key), depth+1)
			}
		case reflect.String:
			found = found || strings.Contains(v.String(), canary)
		}
	}
	h := newHolder()
	walk(reflect.ValueOf(&h), 0)
	if found {
		t.Error("reflection finds the value")
	}
	b := []byte(canary)
	if walk(reflect.ValueOf(struct{ hidden *[]byte }{&b}), 0); !found {
		t.Error("this walk finds nothing at all")
	}
}

func TestValueEqualRevealWipe(t *testing.T) {
	t.Parallel()
	v, same, other := NewValue([]byte(canary)), NewValue([]byte(canary)), NewValue([]byte("x"))
	if !v.Equal(same) || v.Equal(other) || v.Equal(Value{}) || !(Value{}).Equal(NewValue(nil)) {
		t.Error("Equal is wrong")
	}
	if string(v.Reveal()) != canary || v.Len() != len(canary) || (Value{}).Reveal() != nil {
		t.Error("Reveal is wrong")
	}
	duplicate := v
	v.Wipe()
	if bytes.ContainsAny(duplicate.Reveal(), canary) {
		t.Error("a copy outlives Wipe")
	}
	(Value{}).Wipe()
}
