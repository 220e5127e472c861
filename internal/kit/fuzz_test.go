package kit

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func FuzzSums(f *testing.F) {
	sum := strings.Repeat("0a", 32)
	f.Add(sum+"  kit.tar.gz\n", "kit.tar.gz")
	f.Add(sum+" *kit.tar.gz\r\n"+sum, "")
	f.Fuzz(func(t *testing.T, text, name string) {
		if got, err := sumIn(strings.NewReader(text), name); err == nil && (!isSum(got) || !strings.Contains(text, name)) {
			t.Errorf("%q has %q for %q", text, got, name)
		}
	})
}

// FuzzManifest: whatever guest.json says, nothing but what is in its folder is
// looked at, and without its files there is no kit.
func FuzzManifest(f *testing.F) {
	f.Add(`{"arch": "arm64", "kernel": "kernel", "initrd": "initrd", "sha256": {"kernel": "x", "initrd": "x"}}`)
	f.Add(`{"arch": "arm64", "kernel": "..", "initrd": "guest.json", "sha256": {"..": "x", "guest.json": "x"}}`)
	f.Fuzz(func(t *testing.T, text string) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, manifestFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if m, err := verify(dir, "arm64"); err == nil {
			t.Errorf("%q is a kit: %+v", text, m)
		}
	})
}
