package main

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParseMemory(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]uint64{
		"512m": 512, "512M": 512, "512MB": 512, "512MiB": 512, "512 MiB": 512, "2g": 2048, "1.5GiB": 1536, "1t": 1 << 20, "0.5g": 512,
		"": 0, "512": 0, "m": 0, "-1g": 0, "1.5m": 0, "1e3m": 0, "1..5g": 0, "512k": 0, "99999999999t": 0, "0m": 0, "١m": 0,
	} {
		got, err := parseMemory(text)
		if got != want || (err == nil) != (want > 0) {
			t.Errorf("parseMemory(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
}

func TestParseCPUs(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]uint32{
		"2": 2000, "1.5": 1500, "0.25": 250, ".5": 500, "0.0001": 0, "": 0, "x": 0, "-1": 0, "1e3": 0, "99999999999": 0,
	} {
		got, err := parseCPUs(text)
		if got != want || (err == nil) != (want > 0) {
			t.Errorf("parseCPUs(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
}

func TestParseDuration(t *testing.T) {
	t.Parallel()
	day := 24 * time.Hour
	for text, want := range map[string]time.Duration{
		"45s": 45 * time.Second, "1h30m": 90 * time.Minute, "2d": 2 * day, "1d12h": 36 * time.Hour, "0.5d": 12 * time.Hour, "0": 0, "0s": 0,
		"": -1, "30": -1, "-5s": -1, "d": -1, "1d-1h": -1, "999999999d": -1, "1dd": -1, "soon": -1,
	} {
		got, err := parseDuration(text)
		if want >= 0 && (err != nil || got != want) || want < 0 && err == nil {
			t.Errorf("parseDuration(%q) = %s, %v; want %s", text, got, err, want)
		}
	}
}

func TestDurationsAndSizesAreShort(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		312 * time.Microsecond: "0s", 850 * time.Millisecond: "850ms", 4240 * time.Millisecond: "4.2s", 42 * time.Second: "42s",
		200 * time.Second: "3m20s", 3 * time.Minute: "3m", 12 * time.Minute: "12m", 5*time.Hour + 12*time.Minute: "5h12m", 50 * time.Hour: "2d",
	} {
		if got := duration(d); got != want {
			t.Errorf("duration(%d) = %q, want %q", d, got, want)
		}
	}
	if got := age(-time.Second); got != "0s" {
		t.Errorf("age of what is yet to come = %q", got)
	}
	for bytes, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 10 << 10: "10 KiB", 1536 << 20: "1.5 GiB", 512 << 20: "512 MiB", 1048575: "1 MiB", 1 << 62: "4096 PiB",
	} {
		if got := size(bytes); got != want {
			t.Errorf("size(%d) = %q, want %q", bytes, got, want)
		}
	}
}

func TestParseWords(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][]string{
		"a b":                {"a", "b"},
		` sh -c 'a "b"  c' `: {"sh", "-c", `a "b"  c`},
		`a\ b "c\"d" ''`:     {"a b", `c"d`, ""},
		`'a\b'x`:             {`a\bx`},
		"":                   nil, "  ": nil, `'a`: nil, `a\`: nil,
	} {
		got, err := parseWords(text)
		if !slices.Equal(got, want) || (err == nil) != (want != nil) {
			t.Errorf("parseWords(%q) = %q, %v; want %q", text, got, err, want)
		}
	}
}

func FuzzParseMemory(f *testing.F) {
	for _, seed := range []string{"512m", "1.5GiB", "", "..g", "1e9t"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		mib, err := parseMemory(text)
		if (err == nil) != (mib > 0) || mib >= 1<<53 {
			t.Fatalf("%q: %d, %v", text, mib, err)
		}
		if err != nil && !strings.Contains(err.Error(), "\"") {
			t.Fatalf("%q: %v does not quote it", text, err)
		}
	})
}

func FuzzParseDuration(f *testing.F) {
	for _, seed := range []string{"45s", "1d12h", "", "-1s", "9223372036854775807ns", "1e300d"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		d, err := parseDuration(text)
		if d < 0 || err != nil && d != 0 {
			t.Fatalf("%q: %s, %v", text, d, err)
		}
		if again, err2 := parseDuration(d.String()); err == nil && (err2 != nil || again != d) {
			t.Fatalf("%q: %s is read back as %s, %v", text, d, again, err2)
		}
	})
}

// FuzzWords: a command that is printed is read back as it was.
func FuzzWords(f *testing.F) {
	for _, seed := range []string{"sh -c 'a b'", `a\ b`, `""`, "'"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		words, err := parseWords(text)
		if err != nil {
			return
		}
		again, err := parseWords(quoteWords(words))
		if err != nil || !slices.Equal(words, again) {
			t.Fatalf("%q: %q printed and read back is %q, %v", text, words, again, err)
		}
	})
}

func FuzzParsePort(f *testing.F) {
	for _, seed := range []string{"80", "8080:80", "127.0.0.1:1:2/udp", "[::1]:1:2", "[::1]", "/", ":::"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := parsePort(text)
		if err == nil && (p.GetGuestPort() == 0 || p.GetGuestPort() > 65535 || p.GetHostPort() > 65535) {
			t.Fatalf("%q: %v", text, p)
		}
	})
}
