package secrets

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/getsops/sops/v3"
	"github.com/getsops/sops/v3/aes"
	sopsage "github.com/getsops/sops/v3/age"
	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/sandbox"
)

// sops encrypts a file as the sops program would.
func (h host) sops(t *testing.T, name, content string) string {
	t.Helper()
	store, _ := sopsStore(name)
	branches, err := store.LoadPlainFile([]byte(content))
	if err != nil {
		t.Fatal(err)
	}
	master, err := sopsage.MasterKeyFromRecipient(h.recipient.String())
	if err != nil {
		t.Fatal(err)
	}
	tree := sops.Tree{Branches: branches, Metadata: sops.Metadata{
		KeyGroups: []sops.KeyGroup{{master}}, UnencryptedSuffix: "_plain", Version: "3.13.3", LastModified: time.Now().UTC(),
	}}
	dataKey, errs := tree.GenerateDataKey()
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	cipher := aes.NewCipher()
	mac, err := tree.Encrypt(dataKey, cipher)
	if err != nil {
		t.Fatal(err)
	}
	tree.Metadata.MessageAuthenticationCode, err = cipher.Encrypt(mac, dataKey, tree.Metadata.LastModified.Format(time.RFC3339))
	if err != nil {
		t.Fatal(err)
	}
	out, err := store.EmitEncryptedFile(tree)
	if err != nil {
		t.Fatal(err)
	}
	return write(t, h.dir, name, string(out))
}

const sopsYAML = `# a comment
TOP: one
"dotted.key": two
port: 5432
nested:
  list:
    # another
    - x
    - y
  deep: {TOKEN: three}
open_plain: four
nothing: null
`

func TestSopsFiles(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	path := h.sops(t, "s.yaml", sopsYAML)
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(h.dir, "link.json")
	if err := os.Symlink(h.sops(t, "s.json", `{"J":"json","n":{"m":true}}`), link); err != nil {
		t.Fatal(err)
	}
	dotenv := "sops:" + h.sops(t, "s.env", "D=dotenv\nE=other\n")
	set, err := h.resolver.Resolve(t.Context(), []sandbox.SecretRef{
		{Name: "TOP", Source: "sops:" + path},
		{Name: "A", Source: "sops:" + path + `#["dotted.key"]`},
		{Name: "B", Source: "sops:" + path + "#port"},
		{Name: "C", Source: "sops:" + path + "#nested.list.1"},
		{Name: "C2", Source: "sops:" + path + `#["nested"]["list"][0]`},
		{Name: "TOKEN", Source: "sops:" + path + "#nested.deep.TOKEN"},
		{Name: "OPEN", Source: "sops:" + path + "#open_plain"},
		{Name: "J", Source: "sops:" + link},
		{Name: "M", Source: "sops:" + link + "#n.m"},
		{Name: "*", Source: dotenv},
		{Name: "blob", Source: "sops:" + h.sops(t, "s.bin", "bin\x00\n"), File: true},
		{Name: "GONE", Source: "sops:" + path + "#nested.no", Optional: true},
		{Name: "NULL", Source: "sops:" + path + "#nothing", Optional: true},
		{Name: "MAP", Source: "sops:" + path + "#nested", Optional: true},
	}, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"TOP": "one", "A": "two", "B": "5432", "C": "y", "C2": "x", "TOKEN": "three", "OPEN": "four",
		"J": "json", "M": "true", "D": "dotenv", "E": "other", "/blob": "bin\x00\n",
	}
	if diff := cmp.Diff(want, values(set)); diff != "" {
		t.Error(diff)
	}
	if len(set.Missing) != 3 || !errors.Is(set.Missing[0].Err, sandbox.ErrNotFound) || !errors.Is(set.Missing[2].Err, sandbox.ErrCorrupt) {
		t.Errorf("missing: %v", set.Missing)
	}
}

func TestSopsFailuresAreClear(t *testing.T) {
	t.Parallel()
	h, other := newHost(t), newHost(t)
	path := h.sops(t, "s.yaml", "X: "+canary+"\nopen_plain: "+canary+"\n")
	encrypted, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := string(encrypted)
	edited := func(name, old, replacement string) string {
		changed := strings.Replace(text, old, replacement, 1)
		if changed == text {
			t.Fatalf("%s: nothing to change", name)
		}
		return "sops:" + write(t, h.dir, name, changed)
	}
	for source, want := range map[string]error{
		"sops:" + other.sops(t, "o.yaml", "X: "+canary):                              sandbox.ErrDenied,
		edited("mac.yaml", "open_plain: "+canary, "open_plain: other"):               sandbox.ErrCorrupt,
		edited("value.yaml", "X: ENC[AES256_GCM,data:", "X: "+canary):                sandbox.ErrCorrupt,
		edited("tag.yaml", "X: ENC[AES256_GCM,data:", "X: ENC[AES256_GCM,data:AAAA"): sandbox.ErrCorrupt,
		edited("time.yaml", "lastmodified: ", "lastmodified: "+canary):               sandbox.ErrCorrupt,
		"sops:" + path + "#no":                    sandbox.ErrNotFound,
		"sops:" + path + "#X.y":                   sandbox.ErrNotFound,
		"sops:" + h.sops(t, "b", canary) + "#key": sandbox.ErrCorrupt,
	} {
		_, err := h.resolver.Resolve(t.Context(), []sandbox.SecretRef{{Name: "X", Source: source}}, nil, false)
		if !errors.Is(err, want) || strings.Contains(err.Error(), canary) {
			t.Errorf("%s: %v", source, err)
		}
	}
	_, err = newResolver(t, Config{}).Resolve(t.Context(), []sandbox.SecretRef{{Name: "X", Source: "sops:" + path}}, nil, false)
	if !errors.Is(err, sandbox.ErrDenied) || !strings.Contains(err.Error(), "age_identities") {
		t.Errorf("without identities: %v", err)
	}
}

func FuzzSopsFile(f *testing.F) {
	f.Add("s.yaml", []byte("a: b\nsops:\n  mac: x\n"))
	f.Add("s.json", []byte(`{"a":"b","sops":{"mac":"x"}}`))
	f.Add("s.env", []byte("a=b\nsops_mac=x\n"))
	f.Add("s", []byte(`{"data":"ENC[x]","sops":null}`))
	f.Fuzz(func(t *testing.T, name string, content []byte) {
		keys := sopsKeys{}
		if _, err := openSops(name, content, keys); err != nil && len(err.Error()) > 200 {
			t.Errorf("a long error: %v", err)
		}
	})
}
