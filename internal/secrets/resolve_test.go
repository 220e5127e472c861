package secrets

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"filippo.io/age"
	"filippo.io/age/armor"
	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/sandbox"
)

// host is a folder of sources.
type host struct {
	dir       string
	resolver  *Resolver
	recipient *age.X25519Recipient
}

func newHost(t *testing.T) host {
	t.Helper()
	dir := t.TempDir()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	keys := write(t, dir, "keys.txt", "# "+canary+"\n"+identity.String()+"\n")
	credentials := filepath.Join(dir, "credentials")
	if err := os.Mkdir(credentials, 0o700); err != nil {
		t.Fatal(err)
	}
	return host{dir, newResolver(t, Config{AgeIdentities: keys, CredentialsDir: credentials}), identity.Recipient()}
}

func write(t *testing.T, dir, name, content string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (h host) sealed(t *testing.T, name, content string, armored bool) string {
	t.Helper()
	var out bytes.Buffer
	var sink io.Writer = &out
	closeArmor := func() error { return nil }
	if armored {
		outer := armor.NewWriter(&out)
		sink, closeArmor = outer, outer.Close
	}
	w, err := age.Encrypt(sink, h.recipient)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(content)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Close(), closeArmor()); err != nil {
		t.Fatal(err)
	}
	return write(t, h.dir, name, out.String())
}

// values are a set's, by name; a file's name has a slash in front.
func values(set Set) map[string]string {
	m := map[string]string{}
	for _, item := range set.Items {
		name := item.Name
		if item.File {
			name = "/" + name
		}
		m[name] = string(item.Value.Reveal())
	}
	return m
}

func TestResolveReadsLocalSources(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	env := write(t, h.dir, "a.env", "A=1\nB=2\nC=3\n")
	write(t, filepath.Join(h.dir, "credentials"), "cred", "from systemd")
	if err := os.Chmod(filepath.Join(h.dir, "credentials", "cred"), 0o440); err != nil {
		t.Fatal(err)
	}
	set, err := h.resolver.Resolve(t.Context(), []sandbox.SecretRef{
		{Name: "*", Source: "env-file:" + env},
		{Name: "B", Source: "env-file:" + env + "#C"},
		{Name: "tls.key", Source: "file:" + write(t, h.dir, "key", "k\x00\n"), File: true},
		{Name: "CRED", Source: "credential:cred"},
		{Name: "ARMORED", Source: "age:" + h.sealed(t, "a.age", "one", true)},
		{Name: "BINARY", Source: "age:" + h.sealed(t, "b.age", "two", false)},
		{Name: "PUSHED", Source: "inline:x"},
		{Name: "GONE", Source: "env-file:" + env + "#NOPE", Optional: true},
	}, map[string]Value{"x": NewValue([]byte("pushed"))}, false)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"A": "1", "B": "3", "C": "3", "/tls.key": "k\x00\n", "CRED": "from systemd", "ARMORED": "one", "BINARY": "two", "PUSHED": "pushed",
	}
	if diff := cmp.Diff(want, values(set)); diff != "" {
		t.Error(diff)
	}
	if len(set.Missing) != 1 || set.Missing[0].Name != "GONE" || !errors.Is(set.Missing[0].Err, sandbox.ErrNotFound) {
		t.Errorf("missing: %v", set.Missing)
	}
	for _, item := range set.Items {
		if len(item.Version) != 12 {
			t.Errorf("%s has version %q", item.Name, item.Version)
		}
	}
}

func TestVersionChangesWithTheValueAlone(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	version := func(r *Resolver, value string) string {
		set, err := r.Resolve(t.Context(), []sandbox.SecretRef{{Name: "A", Source: "inline:a"}}, map[string]Value{"a": NewValue([]byte(value))}, false)
		if err != nil {
			t.Fatal(err)
		}
		return set.Items[0].Version
	}
	first := version(h.resolver, "1")
	if first != version(h.resolver, "1") || first == version(h.resolver, "2") {
		t.Error("a version does not follow its value")
	}
	if first == version(newHost(t).resolver, "1") {
		t.Error("two resolvers give one version, so it can be guessed from the value")
	}
}

// TestFailuresAreClear is also the canary's: it is in every source, and in no
// error.
func TestFailuresAreClear(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	sub := func(name string, mode os.FileMode) string {
		dir := filepath.Join(h.dir, name)
		if err := errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, mode)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	mode := func(path string, mode os.FileMode) string {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := write(t, h.dir, "good", canary)
	link := filepath.Join(h.dir, "link")
	fifo := filepath.Join(h.dir, "fifo")
	if err := errors.Join(os.Symlink(good, link), syscall.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	mode(write(t, filepath.Join(h.dir, "credentials"), "open", canary), 0o644)
	other := newHost(t)
	sealed := h.sealed(t, "damaged.age", canary, false)
	content, _ := os.ReadFile(sealed)
	content[len(content)-1] ^= 1
	write(t, h.dir, "damaged.age", string(content))

	type failure struct {
		source   string
		sentinel error
		says     string
	}
	cases := []failure{
		{"file:" + h.dir + "/absent", sandbox.ErrNotFound, "does not exist"},
		{"file:" + h.dir + "/no/such", sandbox.ErrNotFound, "does not exist"},
		{"file:" + mode(write(t, h.dir, "open", canary), 0o644), sandbox.ErrDenied, "chmod 600"},
		{"file:" + mode(write(t, h.dir, "group", canary), 0o660), sandbox.ErrDenied, "chmod 600"},
		{"env-file:" + mode(write(t, h.dir, "open.env", "X="+canary), 0o604), sandbox.ErrDenied, "chmod 600"},
		{"file:" + link, sandbox.ErrDenied, "symbolic link"},
		{"file:" + fifo, sandbox.ErrDenied, "not a regular file"},
		{"file:" + fifo + "/x", sandbox.ErrUnavailable, ""},
		{"sops:" + fifo, sandbox.ErrDenied, "not a regular file"},
		{"age:" + fifo, sandbox.ErrDenied, "not a regular file"},
		{"file:" + h.dir, sandbox.ErrDenied, "not a regular file"},
		{"file:" + write(t, sub("shared", 0o777), "x", canary), sandbox.ErrDenied, "chmod o-w"},
		{"file:" + write(t, h.dir, "large", strings.Repeat(canary, 60000)), sandbox.ErrCorrupt, "longer than"},
		{"file:" + write(t, h.dir, "nul", canary+"\x00"), sandbox.ErrCorrupt, "NUL"},
		{"env-file:" + write(t, h.dir, "x.env", "Y="+canary), sandbox.ErrNotFound, "no variable X"},
		{"credential:absent", sandbox.ErrNotFound, "does not exist"},
		{"credential:open", sandbox.ErrDenied, "0400"},
		{"age:" + good, sandbox.ErrCorrupt, "no age file"},
		{"age:" + write(t, h.dir, "header.age", armor.Header+"\n"+canary), sandbox.ErrCorrupt, "no age file"},
		{"age:" + h.dir + "/damaged.age", sandbox.ErrCorrupt, "damaged"},
		{"age:" + other.sealed(t, "other.age", canary, true), sandbox.ErrDenied, "identities"},
		{"age:" + h.sealed(t, "large.age", strings.Repeat(canary, 60000), false), sandbox.ErrCorrupt, "more than"},
		{"inline:absent", sandbox.ErrNotFound, "pushed"},
		{"sops:" + write(t, h.dir, "plain.yaml", "X: "+canary), sandbox.ErrCorrupt, "no sops file"},
		{"sops:" + write(t, h.dir, "plain.json", `{"X":"`+canary+`"`), sandbox.ErrCorrupt, "no sops file"},
		{"sops:" + write(t, h.dir, "plain.env", canary), sandbox.ErrCorrupt, "no sops file"},
		{"sops:" + write(t, h.dir, "plain.bin", canary), sandbox.ErrCorrupt, "no sops file"},
	}
	for i, content := range badEnvFiles() {
		cases = append(cases, failure{"env-file:" + write(t, h.dir, "bad"+string(rune('a'+i))+".env", content), sandbox.ErrCorrupt, "line"})
	}
	for _, c := range cases {
		refs := []sandbox.SecretRef{{Name: "OK", Source: "inline:ok"}, {Name: "X", Source: c.source}}
		inline := map[string]Value{"ok": NewValue([]byte(canary))}
		_, err := h.resolver.Resolve(t.Context(), refs, inline, false)
		field, ok := errors.AsType[*sandbox.FieldError](err)
		if !ok || field.Field != "spec.secrets[1]" || !errors.Is(err, c.sentinel) || !strings.Contains(err.Error(), c.says) ||
			!strings.Contains(err.Error(), c.source) || strings.Contains(err.Error(), canary) {
			t.Errorf("%s: %v", c.source, err)
		}
		refs[1].Optional = true
		set, err := h.resolver.Resolve(t.Context(), refs, inline, false)
		if err != nil || len(set.Items) != 1 || len(set.Missing) != 1 || !errors.Is(set.Missing[0].Err, c.sentinel) {
			t.Errorf("optional %s: %v, %v", c.source, set, err)
		}
		if string(inline["ok"].Reveal()) != canary {
			t.Fatalf("%s: the caller's value was wiped", c.source)
		}
	}
}

func TestOwnerIsChecked(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := write(t, dir, "x", canary)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	stat := *info.Sys().(*syscall.Stat_t)
	stat.Uid = 4242
	foreign := statOf{info, &stat}
	for _, who := range []access{private, credential} {
		if err := (files{uid: 4243}).judge(path, foreign, who); !errors.Is(err, sandbox.ErrDenied) || !strings.Contains(err.Error(), "4242") {
			t.Errorf("another's file: %v", err)
		}
		if err := (files{uid: 4242}).judge(path, foreign, who); err != nil && who == private {
			t.Errorf("one's own file: %v", err)
		}
	}
	stat.Uid = 0
	if err := (files{uid: 4242}).judge(path, foreign, private); err != nil {
		t.Errorf("root's file: %v", err)
	}
}

type statOf struct {
	os.FileInfo
	stat *syscall.Stat_t
}

func (s statOf) Sys() any { return s.stat }

func TestRootsHold(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	allowed, outside := filepath.Join(base, "in"), filepath.Join(base, "in-not")
	if err := errors.Join(os.Mkdir(allowed, 0o700), os.Mkdir(outside, 0o700), os.Symlink(outside, filepath.Join(allowed, "out"))); err != nil {
		t.Fatal(err)
	}
	write(t, outside, "x", canary)
	r := newResolver(t, Config{Roots: []string{allowed}})
	resolve := func(source string) (Set, error) {
		return r.Resolve(t.Context(), []sandbox.SecretRef{{Name: "X", Source: source}}, nil, false)
	}
	for _, source := range []string{"file:" + outside + "/x", "file:" + allowed + "/out/x", "sops:" + allowed + "/out/x", "age:" + outside + "/x", "env-file:" + outside + "/x"} {
		if _, err := resolve(source); !errors.Is(err, sandbox.ErrDenied) || !strings.Contains(err.Error(), "none of the folders") {
			t.Errorf("%s: %v", source, err)
		}
	}
	if set, err := resolve("file:" + write(t, allowed, "y", "1")); err != nil || values(set)["X"] != "1" {
		t.Errorf("inside: %v, %v", set, err)
	}
}

func TestExpansion(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	r := newResolver(t, Config{Forbidden: DefaultForbidden()})
	env := write(t, h.dir, "a.env", "A=1\nGH_TOKEN="+canary)
	dotted := write(t, h.dir, "b.env", "a.b="+canary)
	many := write(t, h.dir, "c.env", manyVariables(maxItems+1))
	star := func(file bool, paths ...string) (refs []sandbox.SecretRef) {
		for _, path := range paths {
			refs = append(refs, sandbox.SecretRef{Name: "*", Source: "env-file:" + path, File: file, Optional: true})
		}
		return refs
	}
	if _, err := r.Resolve(t.Context(), star(false, env), nil, true); !errors.Is(err, sandbox.ErrDenied) || !strings.Contains(err.Error(), "GH_TOKEN") || strings.Contains(err.Error(), canary) {
		t.Errorf("a forbidden name in a file: %v", err)
	}
	set, err := r.Resolve(t.Context(), star(false, dotted), nil, false)
	if err != nil || len(set.Missing) != 1 || !strings.Contains(set.Missing[0].Err.Error(), "a.b") || strings.Contains(set.Missing[0].Err.Error(), canary) {
		t.Errorf("a name that is none: %v, %v", set, err)
	}
	if set, err := r.Resolve(t.Context(), star(true, dotted), nil, false); err != nil || values(set)["/a.b"] != canary {
		t.Errorf("as a file: %v, %v", set, err)
	}
	if _, err := r.Resolve(t.Context(), star(false, env, write(t, h.dir, "d.env", "A=2")), nil, false); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("one name from two files: %v", err)
	}
	if _, err := r.Resolve(t.Context(), star(false, many), nil, false); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("too many: %v", err)
	}
}

func manyVariables(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString("V" + strings.Repeat("X", i%30) + string(rune('A'+i%26)) + string(rune('A'+i/26%26)) + "=1\n")
	}
	return b.String()
}

func TestTotalIsBounded(t *testing.T) {
	t.Parallel()
	r := newResolver(t, Config{})
	inline := map[string]Value{"x": NewValue(make([]byte, maxValue))}
	var refs []sandbox.SecretRef
	for i := range maxTotal/maxValue + 1 {
		refs = append(refs, sandbox.SecretRef{Name: string(rune('A' + i)), Source: "inline:x", File: true})
	}
	if _, err := r.Resolve(t.Context(), refs[1:], inline, false); err != nil {
		t.Error(err)
	}
	if _, err := r.Resolve(t.Context(), refs, inline, false); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("too much: %v", err)
	}
}

func TestIdentitiesMustBePrivate(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	sealed := h.sealed(t, "x.age", canary, true)
	keys := filepath.Join(h.dir, "keys.txt")
	resolve := func(r *Resolver) error {
		_, err := r.Resolve(t.Context(), []sandbox.SecretRef{{Name: "X", Source: "age:" + sealed}}, nil, false)
		return err
	}
	if err := os.Chmod(keys, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := resolve(h.resolver); !errors.Is(err, sandbox.ErrDenied) || !strings.Contains(err.Error(), keys) {
		t.Errorf("open to all: %v", err)
	}
	if err := resolve(newResolver(t, Config{})); !errors.Is(err, sandbox.ErrDenied) || !strings.Contains(err.Error(), "age_identities") {
		t.Errorf("none: %v", err)
	}
	bad := write(t, h.dir, "bad.txt", "AGE-SECRET-KEY-1"+canary)
	if err := resolve(newResolver(t, Config{AgeIdentities: bad})); !errors.Is(err, sandbox.ErrCorrupt) || strings.Contains(err.Error(), canary) {
		t.Errorf("malformed: %v", err)
	}
}

func TestResolveEndsWithItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	cancel()
	_, err := newResolver(t, Config{}).Resolve(ctx, []sandbox.SecretRef{{Name: "X", Source: "file:/x", Optional: true}}, nil, false)
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
