//go:build !darwin || !cgo

package vz

import (
	"errors"
	"testing"
)

func TestElsewhereThePackageSaysThatItIsNotThere(t *testing.T) {
	t.Parallel()
	_, probed := Probe()
	config, options := setup(t)
	_, made := New(config, options)
	for _, err := range []error{probed, made} {
		if host, ok := errors.AsType[*HostError](err); !ok || host.Cure == "" {
			t.Errorf("%v", err)
		}
	}
}
