package store

import (
	"path/filepath"
	"testing"
)

// BenchmarkPut is what each intent costs: two fsyncs and a rename.
func BenchmarkPut(b *testing.B) {
	s, err := Open(filepath.Join(b.TempDir(), "state"))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	rec := record("web")
	for b.Loop() {
		if err := s.Put(rec); err != nil {
			b.Fatal(err)
		}
	}
}
