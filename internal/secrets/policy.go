package secrets

import (
	"path"
	"slices"
	"strings"

	"github.com/choiros/agent/internal/sandbox"
)

// DefaultForbidden returns the names that a keyless sandbox may not have
// unless its host says otherwise: keys that cost money or open an account.
func DefaultForbidden() []string {
	return []string{
		"*_API_KEY", "*_API_KEYS", "*_API_TOKEN", "*_SECRET_KEY", "*_ACCESS_KEY", "*_AUTH_TOKEN",
		"ANTHROPIC_*", "OPENAI_*",
		"AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AWS_BEARER_TOKEN_*",
		"AZURE_CLIENT_SECRET", "GOOGLE_APPLICATION_CREDENTIALS",
		"GITHUB_TOKEN", "GH_TOKEN", "GITHUB_PAT", "GITLAB_TOKEN",
		"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "NPM_TOKEN", "REPLICATE_API_TOKEN",
	}
}

// forbids reports whether a keyless sandbox may not have that name.
func (r *Resolver) forbids(name string) bool {
	return slices.ContainsFunc(r.forbidden, func(pattern string) bool {
		matched, err := path.Match(pattern, strings.ToUpper(name))
		return err == nil && matched
	})
}

// forbidden is the error of a name that the policy forbids.
func forbidden(field, name string) error {
	return &sandbox.FieldError{
		Field:   field,
		Problem: name + " is not allowed in a keyless sandbox on this host; leave it out, or have it provided outside the sandbox",
		Err:     sandbox.ErrDenied,
	}
}

// checkPolicy applies the policy to a reference: to its name and, so that
// renaming is no way around, to the key it names at its source.
func (r *Resolver) checkPolicy(field string, ref sandbox.SecretRef, src source) error {
	if r.forbids(ref.Name) {
		return forbidden(field+".name", ref.Name)
	}
	key := src.key
	if src.scheme == schemeSops && key != "" && key != all {
		keys, err := parseKeyPath(key)
		if err != nil {
			return sandbox.Invalidf(field+".source", "%v", err)
		}
		key, _ = keys[len(keys)-1].(string)
	}
	if key != "" && r.forbids(key) {
		return forbidden(field+".source", key)
	}
	return nil
}
