package guest

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

// SetTime sets the guest's clock. Of a sandbox that has its host's the error
// wraps sandbox.ErrDenied.
func (g *Guest) SetTime(ctx context.Context, now time.Time) error {
	_, err := g.ask(ctx, "set the clock of", &guestv1.Request{Call: &guestv1.Request_SetTime{
		SetTime: &guestv1.SetTime{Time: timestamppb.New(now)},
	}})
	return err
}
