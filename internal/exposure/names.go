package exposure

import (
	"bytes"
	"path"
	"slices"
	"strings"
)

// suspect says what a file may be by its name, or "" if it is none of interest.
// With says, only if its first bytes say so too.
func suspect(at string) (kind Kind, says func(head []byte) bool) {
	name := strings.ToLower(path.Base(at))
	in := func(folder string) bool { return strings.ToLower(path.Base(path.Dir(at))) == folder }
	switch {
	case envFile(name):
		return Environment, nil
	// What is in a .pem may come after a certificate, and PKCS #12 is binary.
	case hasSuffix(name, ".pem", ".p12", ".pfx"):
		return Key, nil
	case keyFile(name):
		return Key, privateKey
	case slices.Contains([]string{".netrc", ".git-credentials", ".pgpass"}, name),
		name == "credentials" && in(".aws"), name == "config" && in(".kube"), name == "msal_token_cache.json" && in(".azure"):
		return Credentials, nil
	case name == ".npmrc", name == ".pypirc":
		return Credentials, password
	case name == "config.json" && in(".docker"):
		return Credentials, mentions(`"auth"`)
	case strings.HasSuffix(name, ".json") && hasPart(name, "credential", "service_account", "service-account"): // Google's
		return Credentials, mentions(`"private_key"`, `"client_secret"`, `"refresh_token"`)
	}
	return "", nil
}

// envFile: .env, .env.local, prod.env; not those that show what to fill in.
func envFile(name string) bool {
	parts := strings.Split(name, ".")
	if !slices.Contains(parts[1:], "env") || parts[0] != "" && parts[len(parts)-1] != "env" {
		return false
	}
	return !slices.ContainsFunc(parts, func(part string) bool {
		return slices.Contains([]string{"example", "sample", "template", "dist"}, part)
	})
}

// keyFile: as keys of TLS (tls.key, AuthKey_1.p8), SSH (id_rsa, deploy_key,
// putty.ppk) and age (key.txt, which age-keygen and sops suggest) are called.
func keyFile(name string) bool {
	return hasSuffix(name, ".key", ".p8", ".ppk", ".agekey", "_key", "-key", "_rsa", "_dsa", "_ecdsa", "_ed25519") ||
		strings.HasPrefix(name, "id_") && !strings.HasSuffix(name, ".pub") || name == "key.txt" || name == "keys.txt"
}

// privateKey knows keys of PEM (RFC 7468; also OpenSSH's), of PuTTY and of age.
func privateKey(head []byte) bool {
	if mentions("PuTTY-User-Key-File-", "AGE-SECRET-KEY-1")(head) {
		return true
	}
	for line := range bytes.Lines(head) {
		line = bytes.TrimSpace(line)
		if bytes.HasPrefix(line, []byte("-----BEGIN ")) && bytes.Contains(line, []byte("PRIVATE KEY")) {
			return true
		}
	}
	return false
}

// password finds a line that sets a token or a password to something else than
// a variable of the environment.
func password(head []byte) bool {
	for line := range bytes.Lines(head) {
		key, value, found := bytes.Cut(line, []byte("="))
		value = bytes.TrimSpace(value)
		if found && len(value) > 0 && !bytes.HasPrefix(value, []byte("${")) && mentions("_auth", "password")(bytes.ToLower(key)) {
			return true
		}
	}
	return false
}

func mentions(texts ...string) func(head []byte) bool {
	return func(head []byte) bool {
		return slices.ContainsFunc(texts, func(text string) bool { return bytes.Contains(head, []byte(text)) })
	}
}

func hasSuffix(name string, endings ...string) bool {
	return slices.ContainsFunc(endings, func(end string) bool { return strings.HasSuffix(name, end) })
}

func hasPart(name string, parts ...string) bool {
	return slices.ContainsFunc(parts, func(part string) bool { return strings.Contains(name, part) })
}
