package secrets

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// DefaultTimeout is how long one source has to answer.
const DefaultTimeout = 15 * time.Second

// Bounds of what is resolved for one sandbox.
const (
	maxValue  = 1 << 20 // bytes
	maxTotal  = 4 << 20 // bytes
	maxItems  = 512
	maxAtOnce = 8 // fetches
)

// Config says where secrets may come from. The zero Config is usable.
type Config struct {
	// CredentialsDir is systemd's, the agent's $CREDENTIALS_DIRECTORY; empty:
	// there is none.
	CredentialsDir string
	// AgeIdentities is a file of age identities, private to the agent's user;
	// empty: there are none.
	AgeIdentities string
	// Roots are folders that env-file, file, age and sops sources must be in
	// once links are resolved; empty: any.
	Roots []string
	// AWS says how to reach Secrets Manager.
	AWS AWSConfig
	// Timeout is how long one source has to answer; zero: DefaultTimeout.
	Timeout time.Duration
	// Forbidden are patterns, as of path.Match and in either case, of names
	// that a keyless sandbox may not have. See DefaultForbidden.
	Forbidden []string
}

// Resolver reads secrets. It is safe for concurrent use and keeps no value.
type Resolver struct {
	cfg       Config
	files     files
	forbidden []string // in upper case
	// versionKey makes versions of values. It is the process's own, so that a
	// version seen in a list or a log tells nothing about the value: a plain
	// hash could be compared with those of likely values.
	versionKey [32]byte
}

// New returns a Resolver, or a *sandbox.FieldError that names what in the
// configuration is wrong. It reads nothing but the roots' real paths.
func New(cfg Config) (*Resolver, error) {
	quietSops()
	r := &Resolver{cfg: cfg, files: files{uid: uint32(os.Getuid())}}
	if cfg.Timeout == 0 {
		r.cfg.Timeout = DefaultTimeout
	}
	if r.cfg.Timeout < 0 {
		return nil, sandbox.Invalidf("secrets.timeout", "%s is negative", cfg.Timeout)
	}
	for i, pattern := range cfg.Forbidden {
		upper := strings.ToUpper(pattern)
		if _, err := path.Match(upper, ""); err != nil || pattern == "" {
			return nil, sandbox.Invalidf(fmt.Sprintf("secrets.forbidden[%d]", i), "%q is no pattern; * and ? and [A-Z] are known", pattern)
		}
		r.forbidden = append(r.forbidden, upper)
	}
	for field, file := range map[string]string{"credentials_dir": cfg.CredentialsDir, "age_identities": cfg.AgeIdentities} {
		if file != "" && !filepath.IsAbs(file) {
			return nil, sandbox.Invalidf("secrets."+field, "%q is not an absolute path", file)
		}
	}
	for i, root := range cfg.Roots {
		field := fmt.Sprintf("secrets.roots[%d]", i)
		if !filepath.IsAbs(root) {
			return nil, sandbox.Invalidf(field, "%q is not an absolute path", root)
		}
		resolved, err := filepath.EvalSymlinks(root)
		if err != nil {
			return nil, sandbox.Invalidf(field, "%v", err)
		}
		r.files.roots = append(r.files.roots, resolved)
	}
	if !safeEndpoint(cfg.AWS.Endpoint) {
		return nil, sandbox.Invalidf("secrets.aws_endpoint", "%q is not an https:// address, nor http:// on loopback", cfg.AWS.Endpoint)
	}
	_, _ = rand.Read(r.versionKey[:]) // never fails, see crypto/rand
	return r, nil
}

func safeEndpoint(text string) bool {
	if text == "" {
		return true
	}
	endpoint, err := url.Parse(text)
	if err != nil || endpoint.Host == "" || endpoint.User != nil {
		return false
	}
	ip := net.ParseIP(endpoint.Hostname())
	loopback := endpoint.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
	return endpoint.Scheme == "https" || endpoint.Scheme == "http" && loopback
}

// Check reports the first thing that is wrong with references by themselves:
// their form, names given twice or also in env, and, for a keyless sandbox,
// names that the policy forbids there and in env. It touches nothing. The
// error is a *sandbox.FieldError and shows no part of a source that is wrong.
func (r *Resolver) Check(refs []sandbox.SecretRef, keyless bool, env map[string]string) error {
	for name := range env {
		if keyless && r.forbids(name) {
			return forbidden("spec.env["+name+"]", name)
		}
	}
	_, err := r.parse(refs, keyless, env)
	return err
}

func (r *Resolver) parse(refs []sandbox.SecretRef, keyless bool, env map[string]string) ([]source, error) {
	sources := make([]source, len(refs))
	for i, ref := range refs {
		src, err := parseRef(fieldOf(i), ref)
		if err != nil {
			return nil, err
		}
		_, taken := env[ref.Name]
		switch {
		case slices.ContainsFunc(refs[:i], func(other sandbox.SecretRef) bool {
			return ref.Name != all && other.Name == ref.Name && other.File == ref.File
		}):
			return nil, sandbox.Invalidf(fieldOf(i)+".name", "%s is the name of another secret", ref.Name)
		case taken && !ref.File:
			return nil, sandbox.Invalidf(fieldOf(i)+".name", "%s is also in spec.env; leave one of them out", ref.Name)
		}
		if keyless {
			if err := r.checkPolicy(fieldOf(i), ref, src); err != nil {
				return nil, err
			}
		}
		sources[i] = src
	}
	return sources, nil
}

// localVersion is the version of a value from a source that has none.
func (r *Resolver) localVersion(value []byte) string {
	mac := hmac.New(sha256.New, r.versionKey[:])
	_, _ = mac.Write(value) // never fails, see hash.Hash
	return hex.EncodeToString(mac.Sum(nil)[:6])
}
