package secrets

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseEnvFile(t *testing.T) {
	t.Parallel()
	got, err := parseEnvFile([]byte("\xef\xbb\xbf# comment = 'x\r\n" + strings.Join([]string{
		"A=plain",
		"export B=exported",
		`C="quoted # not a comment" # comment`,
		"D='single $HOME \\n'",
		`E="two\nlines"`,
		"F=pa$HOME${PATH}word",
		"G=é # comment",
		"H=",
		"I=a=b==",
		"  J = spaced  ",
		"A=again",
		`K="é" # comment`,
		"L=# comment",
		`M="a\"#b"`,
		"",
	}, "\r\n")))
	if err != nil {
		t.Fatal(err)
	}
	text := map[string]string{}
	for key, value := range got {
		text[key] = string(value)
	}
	want := map[string]string{
		"A": "again", "B": "exported", "C": "quoted # not a comment", "D": "single $HOME \\n", "E": "two\nlines",
		"F": "pa$HOME${PATH}word", "G": "é", "H": "", "I": "a=b==", "J": "spaced", "K": "é", "L": "", "M": `a"#b`,
	}
	if diff := cmp.Diff(want, text); diff != "" {
		t.Error(diff)
	}
}

func TestParseEnvFileEchoesNothing(t *testing.T) {
	t.Parallel()
	for _, content := range badEnvFiles() {
		values, err := parseEnvFile([]byte("OK=1\n" + content))
		if err == nil {
			t.Errorf("%.60q was taken: %d values", content, len(values))
			continue
		}
		if strings.Contains(err.Error(), canary) || !strings.Contains(err.Error(), "line") {
			t.Errorf("%.60q: %v", content, err)
		}
	}
}

func badEnvFiles() []string {
	return []string{
		canary, "=" + canary, `A="` + canary, "A='" + canary, "A=x#" + canary, canary + "=x", `A="\` + canary + `"`, `A="` + canary + `\q"`,
		"A=" + canary + "\x01", "-----BEGIN " + canary + "=", "A=" + strings.Repeat(canary, 4000), `A="\u00z` + canary + `"`,
		"A=\"" + canary + "\nsecond\"",
	}
}

func FuzzEnvFile(f *testing.F) {
	f.Add([]byte("A=b\n"))
	for _, content := range badEnvFiles()[:10] {
		f.Add([]byte(content))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		values, err := parseEnvFile(content)
		if err != nil && len(err.Error()) > 300 {
			t.Errorf("a long error: %v", err)
		}
		for key, value := range values {
			if key == "" || len(key)+len(value) > len(content) {
				t.Errorf("%q holds a longer %q", content, key)
			}
		}
	})
}
