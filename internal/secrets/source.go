package secrets

import (
	"fmt"
	"path"
	"regexp"
	"strings"

	"github.com/choiros/agent/internal/sandbox"
)

// The schemes.
const (
	schemeEnvFile    = "env-file"
	schemeFile       = "file"
	schemeCredential = "credential"
	schemeSops       = "sops"
	schemeAge        = "age"
	schemeAWS        = "aws-secretsmanager"
	schemeInline     = "inline"
)

// all is the name, and the key, that stand for everything a source has.
const all = "*"

const (
	maxSourcePath = 4096 // PATH_MAX, see limits.h
	maxAWSName    = 2048 // SecretId, see GetSecretValue
	maxKey        = 256
	maxFileName   = 255 // NAME_MAX, see limits.h
)

var (
	envPattern    = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	inlinePattern = regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)
	// awsPattern is what a secret's name or ARN may hold, see CreateSecret in
	// the Secrets Manager API reference.
	awsPattern = regexp.MustCompile(`^[A-Za-z0-9/_+=.@:!-]+$`)
)

// source is a parsed source string.
type source struct {
	scheme string
	target string // a path, a name or an id; never empty
	key    string // what follows #; empty: none
}

// parseSource reads SCHEME:TARGET[#KEY]. Its errors say what is wrong and do
// not echo text, which may be a value pasted in the wrong place.
func parseSource(text string) (source, error) {
	scheme, rest, found := strings.Cut(text, ":")
	if !found {
		return source{}, fmt.Errorf("is not of the form SCHEME:WHAT, such as file:/path")
	}
	s := source{scheme: scheme, target: rest}
	switch scheme {
	case schemeFile, schemeAge:
		return s, checkPath(s.target)
	case schemeEnvFile, schemeSops:
		if err := s.cutKey(); err != nil {
			return source{}, err
		}
		if scheme == schemeEnvFile && s.key != "" && s.key != all && !envPattern.MatchString(s.key) {
			return source{}, fmt.Errorf("has a key that is not of the form [A-Za-z_][A-Za-z0-9_]*")
		}
		if scheme == schemeSops && s.key != "" && s.key != all {
			if _, err := parseKeyPath(s.key); err != nil {
				return source{}, err
			}
		}
		return s, checkPath(s.target)
	case schemeCredential:
		if !fileName(s.target) {
			return source{}, fmt.Errorf("names no systemd credential: give a file name without slashes of at most %d bytes", maxFileName)
		}
		return s, nil
	case schemeAWS:
		if err := s.cutKey(); err != nil {
			return source{}, err
		}
		if len(s.target) > maxAWSName || !awsPattern.MatchString(s.target) {
			return source{}, fmt.Errorf("names no AWS secret: give its name or ARN, letters, digits and /_+=.@-:! alone")
		}
		return s, nil
	case schemeInline:
		if !inlinePattern.MatchString(s.target) {
			return source{}, fmt.Errorf("names no inline value: give a name of the form [A-Za-z0-9._-]{1,128}")
		}
		return s, nil
	}
	return source{}, fmt.Errorf("is of no known kind; the kinds are %s", strings.Join([]string{
		schemeEnvFile, schemeFile, schemeCredential, schemeSops, schemeAge, schemeAWS, schemeInline,
	}, ", "))
}

// cutKey splits the target at its first #. The path of an env or sops file
// hence holds none.
func (s *source) cutKey() error {
	target, key, found := strings.Cut(s.target, "#")
	switch {
	case !found:
		return nil
	case key == "":
		return fmt.Errorf("has no key after #; leave the # out or name a key")
	case len(key) > maxKey || !printable(key):
		return fmt.Errorf("has a key that is longer than %d bytes or has control characters", maxKey)
	}
	s.target, s.key = target, key
	return nil
}

// unit identifies what is fetched: references with the same unit share one
// fetch.
func (s source) unit() string { return s.scheme + ":" + s.target }

// expandable reports whether Name "*" makes sense.
func (s source) expandable() bool {
	return s.scheme == schemeEnvFile || s.scheme == schemeSops || s.scheme == schemeAWS
}

func checkPath(p string) error {
	switch {
	case !strings.HasPrefix(p, "/"):
		return fmt.Errorf("has a path that is not absolute")
	case len(p) > maxSourcePath || !printable(p):
		return fmt.Errorf("has a path that is longer than %d bytes or has control characters", maxSourcePath)
	case path.Clean(p) != p || p == "/":
		return fmt.Errorf("has a path that is not in its simplest form, without // and /../ and a / at its end")
	}
	return nil
}

// checkName refuses names that cannot be delivered.
func checkName(name string, file bool) error {
	switch {
	case name == all:
		return nil
	case file && !fileName(name):
		return fmt.Errorf("is no file name: it must not be empty, . or .., hold a slash or control character, or exceed %d bytes", maxFileName)
	case !file && !envPattern.MatchString(name):
		return fmt.Errorf("is not of the form [A-Za-z_][A-Za-z0-9_]*")
	}
	return nil
}

func fileName(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) <= maxFileName && !strings.Contains(name, "/") && printable(name)
}

// printable reports whether s is free of control characters.
func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f })
}

// parseRef checks one reference by itself.
func parseRef(field string, ref sandbox.SecretRef) (source, error) {
	if err := checkName(ref.Name, ref.File); err != nil {
		return source{}, sandbox.Invalidf(field+".name", "%v", err)
	}
	src, err := parseSource(ref.Source)
	if err != nil {
		return source{}, sandbox.Invalidf(field+".source", "%v", err)
	}
	switch {
	case ref.Name == all && !src.expandable():
		return source{}, sandbox.Invalidf(field+".name", "is *, which only %s, %s and %s have", schemeEnvFile, schemeSops, schemeAWS)
	case ref.Name == all && src.key != "" && src.key != all:
		return source{}, sandbox.Invalidf(field+".source", "names a key, but the secret's name is *; leave the key out")
	case ref.Name != all && src.key == all:
		return source{}, sandbox.Invalidf(field+".source", "has the key *, which needs the secret's name to be * too")
	}
	return src, nil
}
