package secrets

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/sandbox"
)

func TestParseSource(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]source{
		"env-file:/a/b.env":                    {"env-file", "/a/b.env", ""},
		"env-file:/a/b.env#KEY":                {"env-file", "/a/b.env", "KEY"},
		"file:/a/b#c":                          {"file", "/a/b#c", ""},
		"credential:tls.key":                   {"credential", "tls.key", ""},
		"sops:/s.yaml#a.b":                     {"sops", "/s.yaml", "a.b"},
		`sops:/s.yaml#["a"]["b.c"][0]`:         {"sops", "/s.yaml", `["a"]["b.c"][0]`},
		"age:/x.age":                           {"age", "/x.age", ""},
		"aws-secretsmanager:prod/db#password":  {"aws-secretsmanager", "prod/db", "password"},
		"aws-secretsmanager:arn:aws:s:r:1:s:n": {"aws-secretsmanager", "arn:aws:s:r:1:s:n", ""},
		"inline:token":                         {"inline", "token", ""},
	} {
		got, err := parseSource(text)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
}

func TestCheckNamesTheFieldAndEchoesNothing(t *testing.T) {
	t.Parallel()
	r := newResolver(t, Config{Forbidden: DefaultForbidden()})
	ref := func(name, source string) []sandbox.SecretRef {
		return []sandbox.SecretRef{{Name: name, Source: source}}
	}
	for i, c := range []struct {
		field string
		refs  []sandbox.SecretRef
	}{
		{"spec.secrets[0].source", ref("A", canary)},
		{"spec.secrets[0].source", ref("A", canary+":x")},
		{"spec.secrets[0].source", ref("A", "file:"+canary)},
		{"spec.secrets[0].source", ref("A", "file:/a/../"+canary)},
		{"spec.secrets[0].source", ref("A", "file:/a/"+canary+"/")},
		{"spec.secrets[0].source", ref("A", "file:/"+canary+"\n")},
		{"spec.secrets[0].source", ref("A", "file:/"+strings.Repeat(canary, 1000))},
		{"spec.secrets[0].source", ref("A", "env-file:/a#")},
		{"spec.secrets[0].source", ref("A", "env-file:/a#"+canary)},
		{"spec.secrets[0].source", ref("A", "env-file:/a#"+strings.Repeat("x", 300))},
		{"spec.secrets[0].source", ref("A", "env-file:/a#*")},
		{"spec.secrets[0].source", ref("*", "env-file:/a#B")},
		{"spec.secrets[0].source", ref("A", "credential:a/"+canary)},
		{"spec.secrets[0].source", ref("A", "credential:..")},
		{"spec.secrets[0].source", ref("A", "sops:/a.yaml#"+canary+"..x")},
		{"spec.secrets[0].source", ref("A", `sops:/a.yaml#["`+canary)},
		{"spec.secrets[0].source", ref("A", "aws-secretsmanager:"+canary+" x")},
		{"spec.secrets[0].source", ref("A", "inline:"+canary+" x")},
		{"spec.secrets[0].source", ref("A", "inline:")},
		{"spec.secrets[0].name", ref("*", "file:/a")},
		{"spec.secrets[0].name", ref("1"+canary, "file:/a")},
		{"spec.secrets[0].name", ref("ENV", "file:/a")},
		{"spec.secrets[0].name", []sandbox.SecretRef{{Name: "a/b", Source: "file:/a", File: true}}},
		{"spec.secrets[0].name", []sandbox.SecretRef{{Name: "..", Source: "file:/a", File: true}}},
		{"spec.secrets[1].name", append(ref("A", "file:/a"), ref("A", "file:/b")...)},
	} {
		err := r.Check(c.refs, false, map[string]string{"ENV": canary})
		field, ok := errors.AsType[*sandbox.FieldError](err)
		if !ok || field.Field != c.field || !errors.Is(err, sandbox.ErrInvalid) || strings.Contains(err.Error(), canary) {
			t.Errorf("case %d, want %s: %v", i, c.field, err)
		}
	}
	both := []sandbox.SecretRef{{Name: "A", Source: "file:/a"}, {Name: "A", Source: "file:/a", File: true}, {Name: "tls.key", Source: "file:/a", File: true}}
	if err := r.Check(both, false, nil); err != nil {
		t.Error(err)
	}
}

func TestKeylessForbidsNames(t *testing.T) {
	t.Parallel()
	r := newResolver(t, Config{Forbidden: append(DefaultForbidden(), "my_[ab]*")})
	for i, c := range []struct {
		field string
		ref   sandbox.SecretRef
		env   map[string]string
	}{
		{"spec.secrets[0].name", sandbox.SecretRef{Name: "OPENAI_API_KEY", Source: "file:/a", Optional: true}, nil},
		{"spec.secrets[0].name", sandbox.SecretRef{Name: "openai_api_key", Source: "file:/a", File: true}, nil},
		{"spec.secrets[0].name", sandbox.SecretRef{Name: "MY_ABLE", Source: "file:/a"}, nil},
		{"spec.secrets[0].source", sandbox.SecretRef{Name: "X", Source: "env-file:/a#GH_TOKEN"}, nil},
		{"spec.secrets[0].source", sandbox.SecretRef{Name: "X", Source: "sops:/a.yaml#keys.aws_secret_access_key"}, nil},
		{"spec.env[MISTRAL_API_KEY]", sandbox.SecretRef{Name: "X", Source: "file:/a"}, map[string]string{"MISTRAL_API_KEY": canary}},
	} {
		refs := []sandbox.SecretRef{c.ref}
		err := r.Check(refs, true, c.env)
		field, ok := errors.AsType[*sandbox.FieldError](err)
		if !ok || field.Field != c.field || !errors.Is(err, sandbox.ErrDenied) || strings.Contains(err.Error(), canary) {
			t.Errorf("case %d: %v", i, err)
		}
		if err := r.Check(refs, false, c.env); err != nil {
			t.Errorf("case %d, not keyless: %v", i, err)
		}
		if c.env == nil {
			if _, err := r.Resolve(t.Context(), refs, nil, true); !errors.Is(err, sandbox.ErrDenied) {
				t.Errorf("case %d: resolve: %v", i, err)
			}
		}
	}
}

func TestNewNamesTheField(t *testing.T) {
	t.Parallel()
	for want, cfg := range map[string]Config{
		"secrets.forbidden[1]":    {Forbidden: []string{"A", "[x"}},
		"secrets.timeout":         {Timeout: -1},
		"secrets.credentials_dir": {CredentialsDir: "x"},
		"secrets.age_identities":  {AgeIdentities: "x"},
		"secrets.roots[0]":        {Roots: []string{"/does/not/exist"}},
		"secrets.aws_endpoint":    {AWS: AWSConfig{Endpoint: "http://example.com"}},
	} {
		_, err := New(cfg)
		if field, ok := errors.AsType[*sandbox.FieldError](err); !ok || field.Field != want {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func TestParseKeyPath(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][]any{
		"a":                {"a"},
		"a.b.0":            {"a", "b", "0"},
		`["a"]["b.c"][12]`: {"a", "b.c", 12},
		`["a\"b"]`:         {`a"b`},
		"":                 nil, ".": nil, "a.": nil, "[": nil, "[]": nil, `["a"`: nil, `["a"]x`: nil, "[-1]": nil, "[99999999]": nil, `['a']`: nil, `[""]`: nil,
	} {
		got, err := parseKeyPath(text)
		if (err == nil) != (want != nil) {
			t.Errorf("%q: %v, %v", text, got, err)
		} else if want != nil && !cmp.Equal(got, want) {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func FuzzSource(f *testing.F) {
	for _, s := range []string{"file:/a", "env-file:/a#B", "sops:/a#x.y", `sops:/a#["x"][1]`, "aws-secretsmanager:a#b", "inline:x", "credential:x", "age:/x", ":", "#"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseSource(text)
		if err != nil {
			return
		}
		whole := s.unit()
		if s.key != "" {
			whole += "#" + s.key
		}
		if whole != text || s.target == "" || !printable(text) {
			t.Errorf("%q was read as %+v", text, s)
		}
	})
}

func FuzzKeyPath(f *testing.F) {
	for _, s := range []string{"a.b", `["a"]["b"]`, "[0]", `["\u0041"]`, "["} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		keys, err := parseKeyPath(text)
		if err == nil && (len(keys) == 0 || len(keys) > maxKeyDepth) {
			t.Errorf("%q has %d keys", text, len(keys))
		}
		for _, key := range keys {
			switch key := key.(type) {
			case string:
				if key == "" {
					t.Errorf("%q has an empty key", text)
				}
			case int:
				if key < 0 {
					t.Errorf("%q has index %d", text, key)
				}
			default:
				t.Errorf("%q has a key of type %T", text, key)
			}
		}
	})
}

func newResolver(t *testing.T, cfg Config) *Resolver {
	t.Helper()
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}
