package secrets

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/getsops/sops/v3"
	"github.com/getsops/sops/v3/aes"
	sopsage "github.com/getsops/sops/v3/age"
	"github.com/getsops/sops/v3/config"
	"github.com/getsops/sops/v3/keyservice"
	"github.com/getsops/sops/v3/kms"
	"github.com/getsops/sops/v3/logging"
	"github.com/getsops/sops/v3/stores"
	"github.com/getsops/sops/v3/stores/dotenv"
	"github.com/getsops/sops/v3/stores/json"
	"github.com/getsops/sops/v3/stores/yaml"
	"google.golang.org/grpc"
)

// quietSops keeps the sops library from printing: it warns of comments, and
// quotes them.
func quietSops() {
	for _, logger := range logging.Loggers {
		logger.SetOutput(io.Discard)
	}
}

// sopsFile is a decrypted sops file.
type sopsFile struct {
	branch sops.TreeBranch
	binary bool
}

// openSops decrypts a file whose format its name tells. The library's own
// package decrypt takes keys from the process's environment and its user's
// home; here the keys are those given.
func openSops(path string, content []byte, keys keyservice.KeyServiceClient) (file sopsFile, err error) {
	// The stores are written for files that their user made.
	defer func() {
		if recover() != nil {
			err = corruptf("is no sops file, or a damaged one")
		}
	}()
	store, binary := sopsStore(path)
	tree, err := store.LoadEncryptedFile(content)
	if err != nil {
		return sopsFile{}, corruptf("is no sops file in the format that its name says; make it with sops encrypt")
	}
	dataKey, err := tree.Metadata.GetDataKeyWithKeyServices([]keyservice.KeyServiceClient{keys}, sops.DefaultDecryptionOrder)
	if err != nil {
		return sopsFile{}, deniedf("none of the agent's keys opens it; add the agent's age recipient with sops updatekeys")
	}
	defer clear(dataKey)
	cipher := aes.NewCipher()
	mac, err := tree.Decrypt(dataKey, cipher)
	if err != nil {
		return sopsFile{}, corruptf("is a damaged sops file: a value does not decrypt")
	}
	stored, err := cipher.Decrypt(tree.Metadata.MessageAuthenticationCode, dataKey, tree.Metadata.LastModified.Format(time.RFC3339))
	if text, ok := stored.(string); err != nil || !ok || text != mac {
		return sopsFile{}, corruptf("was changed by hand: its checksum does not match; edit it with sops")
	}
	if len(tree.Branches) == 0 {
		return sopsFile{binary: binary}, nil
	}
	return sopsFile{tree.Branches[0], binary}, nil
}

func sopsStore(path string) (store sops.Store, binary bool) {
	switch strings.ToLower(filepath.Ext(path)) {
	case ".yaml", ".yml":
		return yaml.NewStore(&config.YAMLStoreConfig{}), false
	case ".json":
		return json.NewStore(&config.JSONStoreConfig{}), false
	case ".env":
		return dotenv.NewStore(&config.DotenvStoreConfig{}), false
	}
	return json.NewBinaryStore(&config.JSONBinaryStoreConfig{}), true
}

// lookup finds the value at a key path; without one, the whole of a binary
// file, or the top-level key that is called as the secret.
func (f sopsFile) lookup(src source, name string) ([]byte, error) {
	keys := []any{name}
	switch {
	case f.binary && src.key != "":
		return nil, corruptf("is a binary file, which has no keys; leave the key out")
	case f.binary:
		keys = []any{"data"} // where the format keeps it
	case src.key != "":
		parsed, err := parseKeyPath(src.key)
		if err != nil {
			return nil, err
		}
		keys = parsed
	}
	var at any = f.branch
	for _, key := range keys {
		next, found := step(at, key)
		if !found {
			return nil, missingf("has no such key")
		}
		at = next
	}
	return sopsScalar(at)
}

func step(at, key any) (any, bool) {
	switch at := at.(type) {
	case sops.TreeBranch:
		name, ok := key.(string)
		i := slices.IndexFunc(at, func(item sops.TreeItem) bool { return item.Key == name })
		if !ok || i < 0 {
			return nil, false
		}
		return at[i].Value, true
	case []any:
		n, ok := key.(int)
		if name, isText := key.(string); isText {
			n, ok = index(name)
		}
		elements := slices.DeleteFunc(slices.Clone(at), isComment)
		if !ok || n >= len(elements) {
			return nil, false
		}
		return elements[n], true
	}
	return nil, false
}

func isComment(element any) bool {
	_, ok := element.(sops.Comment)
	return ok
}

func sopsScalar(value any) ([]byte, error) {
	switch value := value.(type) {
	case nil:
		return nil, missingf("has null there")
	case string:
		return []byte(value), nil
	case []byte:
		return value, nil
	case int:
		return strconv.AppendInt(nil, int64(value), 10), nil
	case float64, bool, time.Time:
		return []byte(stores.ValToString(value)), nil
	}
	return nil, corruptf("has a mapping or a list there; name a key inside it")
}

// all returns the top-level keys that hold text.
func (f sopsFile) all() (map[string][]byte, error) {
	if f.binary {
		return nil, corruptf("is a binary file, which has no keys; give the secret a name")
	}
	values := map[string][]byte{}
	for _, item := range f.branch {
		key, named := item.Key.(string)
		value, text := item.Value.(string)
		if named && text {
			values[key] = []byte(value)
		}
	}
	return values, nil
}

func (sopsFile) version() string { return "" }

// sopsKeys decrypts data keys with age identities and with AWS KMS. The
// library calls it without a context, so it is made with a way to decrypt
// that ends in time.
type sopsKeys struct {
	age func() ([]age.Identity, error)
	kms func(*kms.MasterKey) ([]byte, error)
}

func (sopsKeys) Encrypt(context.Context, *keyservice.EncryptRequest, ...grpc.CallOption) (*keyservice.EncryptResponse, error) {
	return nil, errors.ErrUnsupported
}

func (k sopsKeys) Decrypt(_ context.Context, request *keyservice.DecryptRequest, _ ...grpc.CallOption) (*keyservice.DecryptResponse, error) {
	var plain []byte
	var err error
	switch key := request.GetKey().GetKeyType().(type) {
	case *keyservice.Key_AgeKey:
		var identities []age.Identity
		if identities, err = k.age(); err != nil {
			return nil, err
		}
		master := &sopsage.MasterKey{Recipient: key.AgeKey.GetRecipient(), EncryptedKey: string(request.GetCiphertext())}
		sopsage.ParsedIdentities(identities).ApplyToMasterKey(master)
		plain, err = master.Decrypt()
	case *keyservice.Key_KmsKey:
		encryption := map[string]*string{}
		for name, value := range key.KmsKey.GetContext() {
			encryption[name] = &value
		}
		plain, err = k.kms(&kms.MasterKey{
			Arn: key.KmsKey.GetArn(), Role: key.KmsKey.GetRole(), AwsProfile: key.KmsKey.GetAwsProfile(),
			EncryptionContext: encryption, EncryptedKey: string(request.GetCiphertext()),
		})
	default:
		err = errors.ErrUnsupported
	}
	if err != nil {
		return nil, err
	}
	return &keyservice.DecryptResponse{Plaintext: plain}, nil
}

// fetchSops reads and decrypts a sops file. If keys were found wanting, that
// is the cause and is told first.
func (r *Resolver) fetchSops(ctx context.Context, path string) (document, error) {
	content, err := r.files.read(path, public, maxTotal)
	if err != nil {
		return nil, err
	}
	var cause error
	keys := sopsKeys{
		age: func() ([]age.Identity, error) {
			found, err := r.identities()
			cause = err
			return found, err
		},
		kms: func(key *kms.MasterKey) ([]byte, error) {
			if r.cfg.AWS.Credentials != nil {
				kms.NewCredentialsProvider(r.cfg.AWS.Credentials).ApplyToMasterKey(key)
			}
			return key.DecryptContext(ctx)
		},
	}
	file, err := openSops(path, content, keys)
	if late := ended(ctx); err != nil && late != nil {
		return nil, late
	}
	if err != nil && cause != nil {
		return nil, cause
	}
	if err != nil {
		return nil, err
	}
	return file, nil
}
