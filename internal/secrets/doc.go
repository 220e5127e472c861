// Package secrets turns the references of a spec into values: it reads the
// sources, holds what it read in a Value that no formatting shows, and keeps
// the policy of which names a keyless sandbox may not have.
//
// It refuses to read a plain file that others could have read or written, and
// to say in an error what a source holds: what the parsers and clients of the
// sources say is translated, since most of them quote their input. It writes
// nothing, logs nothing, caches no value and reads no environment; only the
// AWS SDK's own chain of credentials does.
package secrets
