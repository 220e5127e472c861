//go:build linux

package lease

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
)

const (
	// firstWait is how long an answer may take; each time that none comes the
	// question is asked again, and may take twice as long.
	firstWait = time.Second
	tries     = 4
	// Pauses between attempts to get a first lease.
	firstPause, mostPause = time.Second, time.Minute
	// renewPause is the least between attempts to renew one; RFC 2131, 4.4.5.
	renewPause = time.Minute
	// lookEvery is how soon a clock that was set is noticed.
	lookEvery = 15 * time.Second
	// jump is how much a clock is set that says that the machine stood still.
	jump = 5 * time.Second
)

// Config is what a Keeper is made of.
type Config struct {
	// MAC is the interface's.
	MAC net.HardwareAddr
	// Open opens a connection that sends from port 68 of the interface and
	// receives there, whether or not the interface has an address.
	Open func() (net.PacketConn, error)
	// Apply sets the interface up, or, given nil, takes back what was set up.
	Apply func(*Lease) error
	// Say is told what a person may want to know.
	Say func(format string, args ...any)
	// Now is the time of day, which is set after the machine stood still; nil:
	// the system's.
	Now func() time.Time
}

// Keeper keeps a lease. It is used by one goroutine at a time.
type Keeper struct {
	cfg  Config
	held *held // nil: there is none
}

// held is a lease that is in force.
type held struct {
	terms
	lease *nclient4.Lease
	// since is when it was given, by the clock that nobody sets, and day by the
	// one that is set; drift is how much that was so far.
	since, day time.Time
	drift      time.Duration
}

// New returns a Keeper.
func New(cfg Config) *Keeper {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Keeper{cfg: cfg}
}

// Ask gets a lease and applies it, and returns once that is done; it asks until
// its context ends.
func (k *Keeper) Ask(ctx context.Context) error {
	pause := firstPause
	for {
		err := k.discover(ctx)
		if err == nil {
			return nil
		}
		if !sleep(ctx, pause) {
			return err
		}
		pause = min(2*pause, mostPause)
	}
}

// Keep renews the lease in time, and gets another when it is lost, until its
// context ends. The lease stays applied then.
func (k *Keeper) Keep(ctx context.Context) {
	for ctx.Err() == nil {
		if k.held == nil {
			if err := k.Ask(ctx); err != nil {
				return
			}
		}
		if k.rest(ctx, k.held.renew) {
			k.renew(ctx)
		}
	}
}

// age is how long the lease has been in force: by the clock that says more,
// since one of them may have stood still with the machine.
func (k *Keeper) age() time.Duration {
	return max(time.Since(k.held.since), k.day().Sub(k.held.day))
}

// day is the time of day without the clock that nobody sets, by which Sub would
// go otherwise.
func (k *Keeper) day() time.Time { return k.cfg.Now().Round(0) }

// rest waits until the lease has an age, or the clock was set: then the machine
// may have been elsewhere. It reports whether the context goes on.
func (k *Keeper) rest(ctx context.Context, until time.Duration) bool {
	for {
		drift := k.day().Sub(k.held.day) - time.Since(k.held.since)
		if (drift - k.held.drift).Abs() > jump {
			k.held.drift = drift
			return ctx.Err() == nil
		}
		left := until - k.age()
		if left <= 0 {
			return ctx.Err() == nil
		}
		if !sleep(ctx, min(left, lookEvery)) {
			return false
		}
	}
}

// renew asks for more time until there is, or the lease is lost.
func (k *Keeper) renew(ctx context.Context) {
	for ctx.Err() == nil {
		age := k.age()
		if age >= k.held.expire {
			k.lose(errors.New("its time is over"))
			return
		}
		err := k.extend(ctx, age)
		if _, refused := errors.AsType[*nclient4.ErrNak](err); refused {
			k.lose(errors.New("the server takes it back"))
			return
		}
		if err == nil {
			return
		}
		bound := k.held.expire
		if age < k.held.rebind {
			bound = k.held.rebind
		}
		next := min(k.age()+max(renewPause, (bound-age)/2), k.held.expire)
		if !k.rest(ctx, next) {
			return
		}
	}
}

// lose takes back what was set up.
func (k *Keeper) lose(why error) {
	k.cfg.Say("the lease of %s is lost: %v", k.held.Address, why)
	k.held = nil
	if err := k.cfg.Apply(nil); err != nil {
		k.cfg.Say("take back what the lease was: %v", err)
	}
}

// discover asks all servers there are for a lease, a few times.
func (k *Keeper) discover(ctx context.Context) error {
	return k.with(nclient4.DefaultServers, tries, func(c *nclient4.Client) error {
		began := time.Now()
		lease, err := c.Request(ctx, wanted())
		if err != nil {
			return err
		}
		return k.hold(lease, began)
	})
}

// extend asks for more time: the server of the lease first, and when it had time
// to answer, whoever hears it.
func (k *Keeper) extend(ctx context.Context, age time.Duration) error {
	to := &net.UDPAddr{IP: k.held.server.AsSlice(), Port: nclient4.ServerPort}
	if age >= k.held.rebind {
		to = nclient4.DefaultServers
	}
	return k.with(to, 2, func(c *nclient4.Client) error {
		began := time.Now()
		lease, err := c.Renew(ctx, k.held.lease, wanted())
		if err != nil {
			return err
		}
		return k.hold(lease, began)
	})
}

// hold applies a lease that was asked for at a time: from then on it counts.
func (k *Keeper) hold(lease *nclient4.Lease, began time.Time) error {
	t, err := read(lease.ACK)
	if err != nil {
		return fmt.Errorf("an answer that is not taken: %w", err)
	}
	if err := k.cfg.Apply(&t.Lease); err != nil {
		return err
	}
	if k.held == nil || k.held.Address != t.Address {
		k.cfg.Say("%s, by %s, for %s", t.Address, t.server, t.expire)
	}
	h := &held{terms: t, lease: lease, since: began, day: k.day().Add(-time.Since(began))}
	k.held = h
	return nil
}

// with asks over a connection of its own: port 68 is nobody's in between.
func (k *Keeper) with(server *net.UDPAddr, tries int, ask func(*nclient4.Client) error) error {
	conn, err := k.cfg.Open()
	if err != nil {
		return err
	}
	client, err := nclient4.NewWithConn(conn, k.cfg.MAC, nclient4.WithServerAddr(server), nclient4.WithTimeout(firstWait), nclient4.WithRetry(tries))
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	return errors.Join(ask(client), client.Close())
}

// wanted are the options that are read.
func wanted() dhcpv4.Modifier {
	return dhcpv4.WithRequestedOptions(dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer, dhcpv4.OptionInterfaceMTU,
		dhcpv4.OptionRenewTimeValue, dhcpv4.OptionRebindingTimeValue)
}

// sleep reports whether the context goes on after a time.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
