package secrets

import (
	"crypto/subtle"
	"fmt"
	"io"
	"log/slog"
)

// redacted is what every formatting of a Value gives, an empty one included.
const redacted = "[secret]"

// Value is a secret. It prints as [secret] through fmt, log/slog and every
// encoder that asks for text. What ignores methods, as fmt does for a Value
// in an unexported field and as dumpers do for everything, finds a function
// and not the bytes: reflection cannot look into a closure.
//
// A Value is a handle: copies share the bytes. The zero Value is empty. It is
// safe for concurrent use but for Wipe.
type Value struct {
	bytes func() []byte
}

// NewValue returns a Value that owns b: the caller leaves b alone from now on.
func NewValue(b []byte) Value {
	if len(b) == 0 {
		return Value{}
	}
	return Value{bytes: func() []byte { return b }}
}

// Reveal returns the secret: the Value's own bytes and no copy, so that there
// is one to wipe. They are not to be changed and not to be used after Wipe.
// Nil if it is empty.
func (v Value) Reveal() []byte {
	if v.bytes == nil {
		return nil
	}
	return v.bytes()
}

// Len is the length in bytes.
func (v Value) Len() int { return len(v.Reveal()) }

// Equal compares in a time that depends on the lengths alone.
func (v Value) Equal(other Value) bool {
	return subtle.ConstantTimeCompare(v.Reveal(), other.Reveal()) == 1
}

// Wipe overwrites the bytes, also those of v's copies, with zeros. It is a
// best effort: what was read through a library or was moved by the runtime
// may have left copies.
func (v Value) Wipe() { clear(v.Reveal()) }

// String returns [secret].
func (Value) String() string { return redacted }

// GoString returns [secret].
func (Value) GoString() string { return redacted }

// Format writes [secret], whatever the verb.
func (Value) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue returns [secret].
func (Value) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText returns [secret]. It serves encoding/json, encoding/xml
// and YAML too.
func (Value) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// wipe overwrites what was read and is not handed on.
func wipe(items []Item) {
	for _, item := range items {
		item.Value.Wipe()
	}
}
