//go:build !linux

package files

import (
	"context"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

// WatchFiles serves a call: not here.
func (s *Service) WatchFiles(context.Context, *wire.Conn, *guestv1.WatchFiles) error {
	return fail(guestv1.Failure_CODE_UNIMPLEMENTED, "files are watched on linux alone")
}
