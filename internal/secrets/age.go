package secrets

import (
	"bufio"
	"bytes"
	"errors"
	"io"

	"filippo.io/age"
	"filippo.io/age/armor"
)

const maxIdentities = 64 << 10 // bytes of the file of age identities

// identities reads the agent's age keys anew, so that a key added is used at
// once.
func (r *Resolver) identities() ([]age.Identity, error) {
	if r.cfg.AgeIdentities == "" {
		return nil, deniedf("this host has no age identities: set secrets.age_identities in the agent's configuration")
	}
	// The administrator chose this file: the folders that references may name
	// do not bind it.
	content, err := files{uid: r.files.uid}.read(r.cfg.AgeIdentities, private, maxIdentities)
	if err != nil {
		return nil, err
	}
	defer clear(content)
	found, err := age.ParseIdentities(bytes.NewReader(content))
	if err != nil {
		return nil, corruptf("%s is no file of age identities, one AGE-SECRET-KEY-… a line", r.cfg.AgeIdentities)
	}
	return found, nil
}

// decryptAge opens an age file, armored or binary.
func decryptAge(content []byte, identities []age.Identity, limit int64) ([]byte, error) {
	input := bufio.NewReader(bytes.NewReader(content))
	var encrypted io.Reader = input
	if start, _ := input.Peek(len(armor.Header)); string(start) == armor.Header {
		encrypted = armor.NewReader(input)
	}
	plain, err := age.Decrypt(encrypted, identities...)
	if _, ok := errors.AsType[*age.NoIdentityMatchError](err); ok {
		return nil, deniedf("none of the agent's age identities opens it; encrypt it to one of them")
	}
	if err != nil {
		return nil, corruptf("is no age file, or a damaged one")
	}
	value, err := io.ReadAll(io.LimitReader(plain, limit+1))
	switch {
	case err != nil:
		clear(value)
		return nil, corruptf("is a damaged age file")
	case int64(len(value)) > limit:
		clear(value)
		return nil, corruptf("holds more than %d bytes", limit)
	}
	return value, nil
}
