package exposure

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
)

const sshKey = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n"

// tree makes a folder with files of these names.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestFilesThatHoldSecretsAreNamed(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		text string
		want Kind // empty: not told of
	}{
		".env":                  {"A=b", Environment},
		".env.local":            {"A=b", Environment},
		".env.production.local": {"A=b", Environment},
		".ENV":                  {"A=b", Environment},
		"sandbox.env":           {"A=b", Environment},
		".env.example":          {"A=b", ""},
		".env.sample":           {"A=b", ""},
		".env.local.template":   {"A=b", ""},
		"example.env":           {"A=b", ""},
		"deep/.env":             {"", ""}, // empty
		".envrc":                {"use flake", ""},
		"env.ts":                {"A=b", ""},
		"src/.env.rs/main.rs":   {"A=b", ""}, // a folder of that name

		"tls/chain.pem": {"-----BEGIN CERTIFICATE-----", Key},
		"a.p12":         {"\x30\x82", Key},
		"tls/tls.key":   {"# ours\n-----BEGIN RSA PRIVATE KEY-----\n", Key},
		"enc.key":       {"-----BEGIN ENCRYPTED PRIVATE KEY-----\n", Key},
		"public.key":    {"-----BEGIN PUBLIC KEY-----\n", ""},
		"lang.key":      {"private key = PRIVATE KEY", ""},
		"id_ed25519":    {sshKey, Key},
		"id_rsa.pub":    {sshKey, ""},
		"id_map":        {"1 2 3", ""},
		"deploy_key":    {sshKey, Key},
		"me.ppk":        {"PuTTY-User-Key-File-3: ssh-ed25519\n", Key},
		"age/keys.txt":  {"# created: 2026\nAGE-SECRET-KEY-1QQQ\n", Key},
		"words/key.txt": {"middle C", ""},
		"late.key":      {strings.Repeat("\n", headBytes) + "-----BEGIN PRIVATE KEY-----\n", ""},

		".netrc":                       {"machine x", Credentials},
		".aws/credentials":             {"[default]", Credentials},
		"src/credentials":              {"[default]", ""},
		".kube/config":                 {"apiVersion: v1", Credentials},
		".docker/config.json":          {`{"auths":{"x":{"auth":"eA=="}}}`, Credentials},
		"b/.docker/config.json":        {`{"credsStore":"osxkeychain"}`, ""},
		".npmrc":                       {"//registry.npmjs.org/:_authToken=npm_x\n", Credentials},
		"b/.npmrc":                     {"//registry.npmjs.org/:_authToken=${NPM_TOKEN}\nalways-auth=true\n", ""},
		".pypirc":                      {"[pypi]\nusername = __token__\npassword = x\n", Credentials},
		"my-service-account.json":      {`{"type":"service_account","private_key":"x"}`, Credentials},
		"gcloud/app_credentials.json":  {`{"refresh_token":"x"}`, Credentials},
		"testdata/credentials.v1.json": {`{}`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := New().Look(t.Context(), tree(t, map[string]string{name: test.text}))
			want := Report{}
			if test.want != "" {
				want = Report{Findings: []Finding{{name, test.want}}, Total: 1}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestWhatOthersMadeIsLeftOut(t *testing.T) {
	t.Parallel()
	dir := tree(t, map[string]string{
		".git/.env": "A=b", "web/node_modules/x/test.pem": "x", "vendor/x/a.pem": "x", ".venv/certifi/cacert.pem": "x",
		"target/CACHEDIR.TAG": cacheSignature + "\n# by cargo", "target/debug/.env": "A=b", "target/.env": "A=b",
		"made/CACHEDIR.TAG": "no such thing", "made/up/.env": "A=b",
	})
	want := Report{Findings: []Finding{{"target/.env", Environment}, {"made/up/.env", Environment}}, Total: 2}
	if diff := cmp.Diff(want, New().Look(t.Context(), dir)); diff != "" {
		t.Error(diff)
	}
}

func TestUpperFoldersComeFirstAndTheRestIsCounted(t *testing.T) {
	t.Parallel()
	files := map[string]string{".env": "A=b"}
	for i := range 40 {
		files[fmt.Sprintf("a/b/%02d.pem", i)] = "x"
	}
	got := New().Look(t.Context(), tree(t, files))
	if got.Total != 41 || got.Incomplete || len(got.Findings) != MaxFindings ||
		got.Findings[0].Path != ".env" || got.Findings[1].Path != "a/b/00.pem" || got.Findings[15].Path != "a/b/14.pem" {
		t.Errorf("%+v", got)
	}
}

// A hostile folder neither holds the look up nor leads it out.
func TestHostileFolders(t *testing.T) {
	t.Parallel()
	outside := tree(t, map[string]string{".env": "A=b", "id_rsa": sshKey})
	dir := tree(t, map[string]string{"in/real.pem": "x"})
	at := func(name string) string { return filepath.Join(dir, name) }
	for from, to := range map[string]string{
		".env": filepath.Join(outside, ".env"), "id_rsa": "../../../../etc/passwd", "out": outside, "in/loop": "..", "self": "self",
		"a.key": "b.key", "b.key": "a.key", "up.env": "/dev/zero",
	} {
		must(t, os.Symlink(to, at(from)))
	}
	must(t, syscall.Mkfifo(at("pipe.pem"), 0o600))
	must(t, syscall.Mkfifo(at("id_ed25519"), 0o600))
	must(t, os.Mkdir(at("folder.pem"), 0o755))
	must(t, os.WriteFile(at("a\x1b[31m\xff\u202e\n.pem"), []byte("x"), 0o600))
	deep := dir
	for range 60 {
		deep = filepath.Join(deep, strings.Repeat("d", 40))
	}
	must(t, os.MkdirAll(deep, 0o755))
	must(t, os.WriteFile(filepath.Join(deep, "deep.pem"), []byte("x"), 0o600))
	got := New().Look(t.Context(), dir)
	end := got.Findings[len(got.Findings)-1].Path
	if !strings.HasPrefix(end, "…d") || !strings.HasSuffix(end, "/deep.pem") || len([]rune(end)) != maxShown {
		t.Errorf("the deepest is %q", end)
	}
	want := Report{Findings: []Finding{{"a\uFFFD[31m\uFFFD\uFFFD\uFFFD.pem", Key}, {"in/real.pem", Key}, {end, Key}}, Total: 3}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestWhatMayNotBeReadIsNotMissed(t *testing.T) {
	t.Parallel()
	if os.Geteuid() == 0 {
		t.Skip("root may read everything; run it as another user")
	}
	dir := tree(t, map[string]string{"id_rsa": sshKey, "closed/.env": "A=b", "open/.env": "A=b"})
	must(t, os.Chmod(filepath.Join(dir, "id_rsa"), 0))
	must(t, os.Chmod(filepath.Join(dir, "closed"), 0))
	t.Cleanup(func() { _ = os.Chmod(filepath.Join(dir, "closed"), 0o700) })
	want := Report{Findings: []Finding{{"id_rsa", Key}, {"open/.env", Environment}}, Total: 2}
	if diff := cmp.Diff(want, New().Look(t.Context(), dir)); diff != "" {
		t.Error(diff)
	}
}

func TestHugeFoldersAreGivenUp(t *testing.T) {
	t.Parallel()
	files := map[string]string{".env": "A=b"}
	for i := range 3 * chunk {
		files[fmt.Sprintf("many/%04d", i)] = ""
	}
	dir := tree(t, files)
	want := Report{Findings: []Finding{{".env", Environment}}, Total: 1, Incomplete: true}
	if diff := cmp.Diff(want, New().look(t.Context(), dir, 2*chunk)); diff != "" {
		t.Error(diff)
	}
	want.Incomplete = false
	if diff := cmp.Diff(want, New().Look(t.Context(), dir)); diff != "" {
		t.Error(diff)
	}
}

func TestLookEndsWithItsContextAndWithoutATurn(t *testing.T) {
	t.Parallel()
	dir := tree(t, map[string]string{".env": "A=b"})
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if got := New().Look(ended, dir); !got.Incomplete {
		t.Errorf("looked on: %+v", got)
	}
	busy := New()
	for range maxLooks { // as looks at file systems that hang would
		busy.turns <- struct{}{}
	}
	began := time.Now()
	if got := busy.Look(t.Context(), dir); !got.Incomplete || got.Total != 0 || time.Since(began) < patience {
		t.Errorf("after %s: %+v", time.Since(began), got)
	}
	<-busy.turns
	for range 3 { // each gives its turn back
		if got := busy.Look(t.Context(), dir); got.Total != 1 || got.Incomplete {
			t.Errorf("%+v", got)
		}
	}
}

func TestAFolderThatIsGoneShowsNothing(t *testing.T) {
	t.Parallel()
	if got := New().Look(t.Context(), filepath.Join(t.TempDir(), "gone")); got.Total != 0 || got.Incomplete {
		t.Errorf("%+v", got)
	}
	if got := New().Look(t.Context(), filepath.Join(tree(t, map[string]string{"f": "x"}), "f")); !got.Incomplete {
		t.Errorf("a file: %+v", got)
	}
}

// FuzzNames: whatever a workload calls its files, their names can be printed,
// and whatever they begin with, they are judged.
func FuzzNames(f *testing.F) {
	f.Add(".env\x1b[2J", []byte("A=b"))
	f.Add(strings.Repeat("\xff\u202e/", 500)+".npmrc", []byte("_auth=\n=\n"))
	f.Add("id_rsa", []byte(sshKey))
	f.Fuzz(func(t *testing.T, name string, head []byte) {
		shown := printable(name)
		if len([]rune(shown)) > maxShown || strings.ContainsFunc(shown, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q is shown as %q", name, shown)
		}
		kind, says := suspect(name)
		if says != nil && kind == "" {
			t.Errorf("%q is nothing, if it says so", name)
		}
		if says != nil {
			says(head)
		}
	})
}
