// Package mac_test tries what is made for a Mac, tools/mac-check, tools/mac-sign
// and the agent's entitlements, where there is none: with stand-ins for what
// macOS has and for an agent, from testdata.
package mac_test

import (
	"bufio"
	"encoding/xml"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// mac is a stand-in for one.
type mac struct {
	t      *testing.T
	dir    string // what the stand-ins share
	home   string
	result string
	env    []string
}

func newMac(t *testing.T) *mac {
	t.Helper()
	dir := t.TempDir()
	m := &mac{t: t, dir: filepath.Join(dir, "fake"), home: filepath.Join(dir, "home"), result: filepath.Join(dir, "out", "result.md")}
	programs := filepath.Join(dir, "bin")
	for _, folder := range []string{m.dir, m.home, programs} {
		m.check(os.Mkdir(folder, 0o700))
	}
	for _, name := range []string{
		"uname", "sw_vers", "sysctl", "clang", "codesign", "make", "file", "plutil", "pgrep", "pkill", "agent", "agentctl",
	} {
		stands := "tool"
		if strings.HasPrefix(name, "agent") {
			stands = name
		}
		target, err := filepath.Abs(filepath.Join("testdata", stands))
		m.check(err)
		m.check(os.Symlink(target, filepath.Join(programs, name)))
	}
	m.env = append(os.Environ(),
		"PATH="+programs+":"+os.Getenv("PATH"), "MAC_CHECK_BIN="+programs, "HOME="+m.home, "XDG_STATE_HOME=", "FAKE="+m.dir, "FAKE_PORT="+echo(t))
	t.Cleanup(m.end)
	return m
}

// end ends the stand-in of an agent, if a checklist that failed has left it.
func (m *mac) end() {
	text, _ := os.ReadFile(filepath.Join(m.dir, "agent"))
	if pid, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && pid > 1 {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

func (m *mac) check(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// echo listens on a port and sends back what it is sent.
func echo(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

// broken has things not work from now on.
func (m *mac) broken(words ...string) {
	m.t.Helper()
	m.check(os.WriteFile(filepath.Join(m.dir, "broken"), []byte(strings.Join(words, "\n")), 0o600))
}

// run runs one of the project's tools and returns what it prints and its exit
// status.
func (m *mac) run(tool string, args ...string) (string, int) {
	m.t.Helper()
	cmd := exec.CommandContext(m.t.Context(), filepath.Join("..", "..", "tools", tool), args...)
	cmd.Env = m.env
	out, err := cmd.CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return string(out), exit.ExitCode()
	}
	m.check(err)
	return string(out), 0
}

// checklist runs tools/mac-check and returns the verdicts by items, and the
// result file.
func (m *mac) checklist(status int, args ...string) (verdicts map[string]string, result string) {
	m.t.Helper()
	kit := filepath.Join(m.dir, "kit.tar.gz")
	m.check(os.WriteFile(kit, nil, 0o600))
	out, got := m.run("mac-check", append([]string{"-o", m.result, "--kit", kit}, args...)...)
	text, err := os.ReadFile(m.result)
	if got != status || err != nil {
		m.t.Fatalf("status %d, not %d; %v\n%s\n%s", got, status, err, out, text)
	}
	verdicts = map[string]string{}
	for line := range strings.Lines(string(text)) {
		if cells := strings.Split(line, " | "); len(cells) == 4 {
			verdicts[strings.TrimPrefix(cells[0], "| ")] = cells[1]
		}
	}
	delete(verdicts, "item")
	if left, err := filepath.Glob("/tmp/mac-check.*/agent.toml"); err != nil || slices.ContainsFunc(left, m.owns) {
		m.t.Errorf("it left %q, %v", left, err)
	}
	return verdicts, string(text)
}

// owns reports whether a folder is that of this checklist.
func (m *mac) owns(path string) bool {
	config, err := os.ReadFile(filepath.Join(m.dir, "config"))
	return err == nil && strings.TrimSpace(string(config)) == path
}

func with(verdicts map[string]string, verdict string) []string {
	var names []string
	for name, got := range verdicts {
		if got == verdict {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func TestChecklistPassesOnAMacWhereAllWorks(t *testing.T) {
	t.Parallel()
	m := newMac(t)
	verdicts, result := m.checklist(0)
	if len(verdicts) != 17 || len(with(verdicts, "pass")) != 17 {
		t.Errorf("%v\n%s", verdicts, result)
	}
	for _, want := range []string{
		"# mac-check: 17 passed, 0 failed, 0 skipped\n", "| agentctl | v1.2.3 |", "| macOS | macOS 15.1 (24B83) |",
		"| model | Mac14,2 |", "| processor | Apple M2 |", "| memory | 16 GiB |", "| guest kernel | 6.12.1 |",
	} {
		if !strings.Contains(result, want) {
			t.Errorf("the result lacks %q:\n%s", want, result)
		}
	}
	for _, path := range []string{filepath.Join(m.home, "Library", "LaunchAgents", "choiros.agent.plist"), m.result + ".new"} {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("it left %s", path)
		}
	}
	calls, err := os.ReadFile(filepath.Join(m.dir, "calls"))
	m.check(err)
	for _, want := range []string{"make -s -C ", "guest-kit install " + filepath.Join(m.dir, "kit.tar.gz") + " --state-dir /", "agent install --agent-binary "} {
		if !strings.Contains(string(calls), want) {
			t.Errorf("it never called %q:\n%s", want, calls)
		}
	}
}

func TestChecklistGoesOnAfterAFailure(t *testing.T) {
	t.Parallel()
	m := newMac(t)
	m.broken("pause", "read-only", "disk")
	m.check(os.WriteFile(filepath.Join(m.dir, "unsigned"), nil, 0o600))
	verdicts, result := m.checklist(1)
	if got := strings.Join(with(verdicts, "fail"), " "); got != "build disk pause shares" || len(with(verdicts, "pass")) != 13 {
		t.Errorf("failed: %s\n%s", got, result)
	}
	for _, want := range []string{
		"# mac-check: 13 passed, 4 failed, 0 skipped\n",
		"\n## pause\n\n    $ agentctl sandbox pause check\n    agentctl: [31mthe machine cannot be halted[0m at ~\n", // and no escape
		"\n    a read-only folder was written to\n",
		"\n    it should have failed\n",
		"it is signed without the entitlement com.apple.security.virtualization\n",
		"\n## the agent's log\n\n    the agent was started\n",
	} {
		if !strings.Contains(result, want) {
			t.Errorf("the result lacks %q:\n%s", want, result)
		}
	}
}

func TestChecklistFailsWithoutAnAgentItemByItem(t *testing.T) {
	t.Parallel()
	m := newMac(t)
	link := filepath.Join(filepath.Dir(m.dir), "bin", "agent")
	m.check(os.Remove(link))
	m.check(os.WriteFile(link, []byte("#!/bin/sh\necho no agent today\nexit 1\n"), 0o700))
	verdicts, result := m.checklist(1, "--limit", "8")
	if got := strings.Join(with(verdicts, "pass"), " "); got != "build kit" || len(verdicts) != 17 {
		t.Errorf("passed: %s\n%s", got, result)
	}
	if !strings.Contains(result, "no agent today") {
		t.Errorf("the result does not say why:\n%s", result)
	}
}

func TestChecklistEndsWhatTakesTooLong(t *testing.T) {
	t.Parallel()
	m := newMac(t)
	m.broken("hang")
	verdicts, result := m.checklist(1, "--limit", "15")
	if verdicts["start"] != "fail" || verdicts["image"] != "pass" || !strings.Contains(result, "\n    it took longer than 15 seconds\n") {
		t.Errorf("%v\n%s", verdicts, result)
	}
}

func TestChecklistSkipsWhatAMacCannot(t *testing.T) {
	t.Parallel()
	m := newMac(t)
	m.env = append(m.env, "FAKE_MACOS=13.6")
	agents := filepath.Join(m.home, "Library", "LaunchAgents")
	m.check(os.MkdirAll(agents, 0o700))
	mine := filepath.Join(agents, "choiros.agent.plist")
	m.check(os.WriteFile(mine, []byte("mine"), 0o600))
	m.broken("launchd", "rosetta")
	verdicts, result := m.checklist(0)
	if got := strings.Join(with(verdicts, "skip"), " "); got != "hibernate launchd rosetta" {
		t.Errorf("skipped: %s\n%s", got, result)
	}
	for _, want := range []string{"twice: it takes macOS 14 |", "Rosetta: Rosetta is not installed", "the machine runs on: an agent of yours is installed"} {
		if !strings.Contains(result, want) {
			t.Errorf("the result lacks %q:\n%s", want, result)
		}
	}
	if text, err := os.ReadFile(mine); err != nil || string(text) != "mine" {
		t.Errorf("the service that was there is %q, %v", text, err)
	}
}

func TestChecklistIsForAMac(t *testing.T) {
	t.Parallel()
	m := newMac(t)
	for want, args := range map[string][]string{
		"mac-check: this is Linux: the checklist is for a Mac, see docs/mac.md\n": nil,
		"mac-check: -o needs a value\n":                                           {"-o"},
		"mac-check: --kit: there is no /none\n":                                   {"--anywhere", "--kit", "/none"},
		"mac-check: --limit: soon is no number of seconds\n":                      {"--anywhere", "--limit", "soon"},
		"mac-check: --all is not known; the head of tools/mac-":                   {"--all"},
	} {
		m.env = append(m.env, "FAKE_SYSTEM=Linux")
		out, status := m.run("mac-check", args...)
		if status != 2 || !strings.HasPrefix(out, want) {
			t.Errorf("%q: status %d, %s", args, status, out)
		}
	}
}

func TestSigningIsVerified(t *testing.T) {
	t.Parallel()
	m := newMac(t)
	program := filepath.Join(m.dir, "program")
	m.check(os.WriteFile(program, nil, 0o700))
	if out, status := m.run("mac-sign", program); status != 0 || out != "" {
		t.Errorf("status %d, %s", status, out)
	}
	calls, err := os.ReadFile(filepath.Join(m.dir, "calls"))
	if want := "codesign --force --sign - --identifier choiros.agent --entitlements /"; err != nil || !strings.HasPrefix(string(calls), want) {
		t.Errorf("it called %q, %v", calls, err)
	}
	m.check(os.WriteFile(filepath.Join(m.dir, "unsigned"), nil, 0o600))
	if out, status := m.run("mac-sign", "--verify", program); status != 1 || !strings.Contains(out, "without the entitlement com.apple.security.virtualization") {
		t.Errorf("no entitlement: status %d, %s", status, out)
	}
	m.check(os.WriteFile(filepath.Join(m.dir, "invalid"), nil, 0o600))
	if out, status := m.run("mac-sign", "--verify", program); status != 1 || !strings.Contains(out, "its signature is not valid") {
		t.Errorf("no signature: status %d, %s", status, out)
	}
	for _, args := range [][]string{{}, {"a", "b"}, {m.dir + "/none"}} {
		if out, status := m.run("mac-sign", args...); status != 1 || !strings.HasPrefix(out, "mac-sign: ") {
			t.Errorf("%q: status %d, %s", args, status, out)
		}
	}
}

// The entitlements are one, in the form that plutil(1) and codesign(1) read.
func TestEntitlements(t *testing.T) {
	t.Parallel()
	file, err := os.Open("../../cmd/agent/agent.entitlements")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var plist struct {
		XMLName xml.Name `xml:"plist"`
		Version string   `xml:"version,attr"`
		Dict    struct {
			Keys []string `xml:"key"`
			Rest []struct {
				XMLName xml.Name
				Text    string `xml:",chardata"`
			} `xml:",any"`
		} `xml:"dict"`
	}
	if err := xml.NewDecoder(bufio.NewReader(file)).Decode(&plist); err != nil {
		t.Fatal(err)
	}
	rest := plist.Dict.Rest
	if plist.Version != "1.0" || !slices.Equal(plist.Dict.Keys, []string{"com.apple.security.virtualization"}) || len(rest) != 1 ||
		rest[0].XMLName.Local != "true" || rest[0].Text != "" {
		t.Errorf("%+v", plist)
	}
}
