package secrets

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/secretsmanager"
	"github.com/aws/aws-sdk-go-v2/service/secretsmanager/types"
	"github.com/aws/smithy-go"
)

// AWSConfig says how to reach AWS. What is left empty is found by the SDK's
// own chain: environment, shared configuration, instance role.
type AWSConfig struct {
	// Endpoint replaces the service's URL, for a private endpoint; https,
	// or http on a loopback address.
	Endpoint string
	Region   string
	Profile  string
	// Credentials replaces the SDK's chain; nil: the chain.
	Credentials aws.CredentialsProvider
}

// maxAnswer bounds an answer: a secret is at most 64 KiB, see "AWS Secrets
// Manager quotas".
const maxAnswer = 2 << 20

// boundedClient ends answers that are too long.
type boundedClient struct{ inner aws.HTTPClient }

func (c boundedClient) Do(request *http.Request) (*http.Response, error) {
	response, err := c.inner.Do(request)
	if err != nil {
		return nil, err
	}
	response.Body = &boundedBody{ReadCloser: response.Body, left: maxAnswer}
	return response, nil
}

type boundedBody struct {
	io.ReadCloser
	left int
}

var errLongAnswer = errors.New("answer is too long")

func (b *boundedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.left -= n; b.left < 0 {
		return 0, errLongAnswer
	}
	return n, err
}

// awsSecret is one answer of Secrets Manager.
type awsSecret struct {
	whole     []byte
	versionID string
}

func (r *Resolver) fetchAWS(ctx context.Context, id string) (document, error) {
	options := []func(*config.LoadOptions) error{
		// The client lives as long as this call, and so do its connections.
		config.WithHTTPClient(awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) { t.DisableKeepAlives = true })),
		// In any other mode the SDK may log what it is answered.
		config.WithClientLogMode(0),
	}
	if r.cfg.AWS.Region != "" {
		options = append(options, config.WithRegion(r.cfg.AWS.Region))
	}
	if r.cfg.AWS.Profile != "" {
		options = append(options, config.WithSharedConfigProfile(r.cfg.AWS.Profile))
	}
	if r.cfg.AWS.Credentials != nil {
		options = append(options, config.WithCredentialsProvider(r.cfg.AWS.Credentials))
	}
	loaded, err := config.LoadDefaultConfig(ctx, options...)
	if err != nil {
		return nil, unavailablef("the AWS configuration cannot be loaded: check the profile in the agent's configuration and ~/.aws")
	}
	if loaded.Region == "" && r.cfg.AWS.Endpoint == "" {
		return nil, unavailablef("no AWS region is configured: set secrets.aws_region in the agent's configuration")
	}
	client := secretsmanager.NewFromConfig(loaded, func(o *secretsmanager.Options) {
		// Not sooner: of another client's than its own the SDK cannot change
		// the certificates, as AWS_CA_BUNDLE may ask it to.
		o.HTTPClient = boundedClient{loaded.HTTPClient}
		if r.cfg.AWS.Endpoint != "" {
			o.BaseEndpoint = &r.cfg.AWS.Endpoint
		}
	})
	answer, err := client.GetSecretValue(ctx, &secretsmanager.GetSecretValueInput{SecretId: &id})
	if err != nil {
		return nil, awsProblem(ctx, err)
	}
	secret := awsSecret{whole: answer.SecretBinary, versionID: aws.ToString(answer.VersionId)}
	if answer.SecretString != nil {
		secret.whole = []byte(*answer.SecretString)
	}
	if !inlinePattern.MatchString(secret.versionID) {
		secret.versionID = ""
	}
	return secret, nil
}

// awsProblem translates an answer that is an error. Its message is the
// server's and is not passed on.
func awsProblem(ctx context.Context, err error) error {
	if _, ok := errors.AsType[*types.ResourceNotFoundException](err); ok {
		return missingf("AWS has no such secret in this region and account")
	}
	if _, ok := errors.AsType[*types.InvalidRequestException](err); ok {
		return missingf("AWS has the secret marked for deletion, or it has no current version")
	}
	if errors.Is(err, errLongAnswer) {
		return corruptf("AWS answered with more than %d bytes", maxAnswer)
	}
	if late := ended(ctx); late != nil {
		return late
	}
	api, ok := errors.AsType[smithy.APIError](err)
	if !ok {
		return unavailablef("AWS Secrets Manager cannot be reached, or the agent has no AWS credentials: check the network, the region and the agent's role")
	}
	switch api.ErrorCode() {
	case "AccessDeniedException", "UnrecognizedClientException", "InvalidSignatureException", "ExpiredTokenException":
		return deniedf("AWS denies the agent's role this secret: allow it secretsmanager:GetSecretValue")
	case "DecryptionFailure":
		return deniedf("AWS cannot decrypt the secret: allow the agent's role kms:Decrypt on its key")
	case "ThrottlingException", "TooManyRequestsException":
		return unavailablef("AWS Secrets Manager throttles this account; try again later")
	case "InvalidParameterException", "ValidationException":
		return corruptf("AWS takes the name for none of a secret")
	}
	return unavailablef("AWS Secrets Manager answers with an error of its own; try again later")
}

func (s awsSecret) lookup(src source, _ string) ([]byte, error) {
	if src.key == "" {
		return bytes.Clone(s.whole), nil
	}
	members, err := s.members()
	if err != nil {
		return nil, err
	}
	raw, found := members[src.key]
	if !found {
		return nil, missingf("has no such member")
	}
	return jsonScalar(raw)
}

func (s awsSecret) all() (map[string][]byte, error) {
	members, err := s.members()
	if err != nil {
		return nil, err
	}
	values := make(map[string][]byte, len(members))
	for key, raw := range members {
		if values[key], err = jsonScalar(raw); err != nil {
			return nil, err
		}
	}
	return values, nil
}

func (s awsSecret) version() string { return s.versionID }

func (s awsSecret) members() (map[string]json.RawMessage, error) {
	var members map[string]json.RawMessage
	if json.Unmarshal(s.whole, &members) != nil || members == nil {
		return nil, corruptf("is no JSON object, so it has no members; leave the key out")
	}
	return members, nil
}

// jsonScalar returns a text's content, and a number or a boolean as written.
func jsonScalar(raw json.RawMessage) ([]byte, error) {
	switch raw[0] {
	case '"':
		var text string
		if json.Unmarshal(raw, &text) != nil {
			return nil, corruptf("has a member that is no valid text")
		}
		return []byte(text), nil
	case '{', '[':
		return nil, corruptf("has a member that is no text, number or boolean")
	case 'n':
		return nil, missingf("has null there")
	}
	return bytes.Clone(raw), nil
}
