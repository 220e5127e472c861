package server

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/choiros/agent/internal/sandbox"
)

// TestErrorsAreDocumented ties docs/errors.md to the table of errors.
func TestErrorsAreDocumented(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "errors.md"))
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	for _, row := range sandbox.Failures() {
		want := fmt.Sprintf("\n| `%s` | %s | %d | ", row.Reason, codeName(codes.Code(row.Code)), row.Exit)
		if strings.Count(string(text), want) != 1 {
			t.Errorf("docs/errors.md has no row %q", want)
		}
		rows++
	}
	table, _, _ := strings.Cut(string(text[strings.Index(string(text), "## Reasons"):]), "Three more")
	if got := strings.Count(table, "\n| `"); got != rows {
		t.Errorf("docs/errors.md has %d reasons, the table %d", got, rows)
	}
	for _, reason := range []string{reasonCancelled, reasonDeadline, reasonStopping} {
		if !strings.Contains(string(text), "| `"+reason+"` |") {
			t.Errorf("docs/errors.md does not tell of %s", reason)
		}
	}
}

// codeName is a code as google.rpc.Code spells it.
func codeName(code codes.Code) string {
	var b strings.Builder
	for i, r := range code.String() {
		if i > 0 && r >= 'A' && r <= 'Z' {
			b.WriteByte('_')
		}
		b.WriteRune(r)
	}
	return strings.ToUpper(b.String())
}
