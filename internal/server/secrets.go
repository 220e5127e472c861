package server

import (
	"context"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

// maxSecret is the longest value taken, in bytes.
const maxSecret = 1 << 20

type secretService struct {
	agentv1.UnimplementedSecretServiceServer
	manager *manager.Manager
}

// checkValues refuses values of secrets that are too long. It says nothing of
// what they are.
func checkValues(field string, values map[string][]byte) error {
	for name, value := range values {
		if name == "" {
			return sandbox.Invalidf(field, "has a value without a name")
		}
		if len(value) > maxSecret {
			return sandbox.Invalidf(field+"["+name+"]", "is longer than %d bytes", maxSecret)
		}
	}
	return nil
}

func (s *secretService) SetSecrets(ctx context.Context, req *agentv1.SetSecretsRequest) (*agentv1.SetSecretsResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	if err := checkValues("values", req.GetValues()); err != nil {
		return nil, err
	}
	delivery, err := s.manager.SetSecrets(ctx, req.GetName(), req.GetValues())
	if err != nil {
		return nil, err
	}
	var answer agentv1.SetSecretsResponse
	if delivery != nil {
		answer.Delivery = deliveryToWire(*delivery)
	}
	return &answer, nil
}

func (s *secretService) PushSecrets(ctx context.Context, req *agentv1.PushSecretsRequest) (*agentv1.PushSecretsResponse, error) {
	if req.GetName() != "" {
		if err := sandbox.ValidateName("name", req.GetName()); err != nil {
			return nil, err
		}
		if req.GetLabelSelector() != "" {
			return nil, sandbox.Invalidf("label_selector", "is given together with name; give one")
		}
	}
	selector, err := manager.ParseSelector(req.GetLabelSelector())
	if err != nil {
		return nil, err
	}
	deliveries, err := s.manager.PushSecrets(ctx, req.GetName(), selector, req.GetForce())
	if err != nil {
		return nil, err
	}
	var answer agentv1.PushSecretsResponse
	for _, d := range deliveries {
		answer.Deliveries = append(answer.Deliveries, deliveryToWire(d))
	}
	return &answer, nil
}

func deliveryToWire(d manager.Delivery) *agentv1.SecretDelivery {
	w := &agentv1.SecretDelivery{
		Name: d.Name, Changed: d.Changed, Action: rotationActionToWire(d.Action),
		Outcome: agentv1.SecretDelivery_OUTCOME_ACKNOWLEDGED,
	}
	switch {
	case d.Err != nil:
		w.Outcome, w.Message = agentv1.SecretDelivery_OUTCOME_FAILED, validUTF8(d.Err.Error())
	case d.Action == "":
		w.Outcome = agentv1.SecretDelivery_OUTCOME_UNCHANGED
	}
	return w
}

func (s *secretService) ListSecrets(ctx context.Context, req *agentv1.ListSecretsRequest) (*agentv1.ListSecretsResponse, error) {
	if err := sandbox.ValidateName("name", req.GetName()); err != nil {
		return nil, err
	}
	secrets, err := s.manager.Secrets(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	var answer agentv1.ListSecretsResponse
	for _, g := range secrets {
		answer.Secrets = append(answer.Secrets, &agentv1.Secret{
			Name: g.Name, Source: g.Source, File: g.File, Optional: g.Optional, Version: g.Version,
			DeliverTime: timeToWire(g.GivenAt), Missing: g.Missing != "", Message: validUTF8(g.Missing),
		})
	}
	return &answer, nil
}
