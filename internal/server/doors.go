package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/user"
	"slices"
	"strconv"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"

	"github.com/choiros/agent/internal/sandbox"
)

// Access says who may use the unix socket: root, the agent's own user, and
// the members of one group, if there is one.
type Access struct {
	uid int // the agent's
	// gid of the group; -1: none.
	gid int
}

// NewAccess looks a group up, by name or number. Empty: no group.
func NewAccess(group string) (Access, error) {
	access := Access{uid: os.Geteuid(), gid: -1}
	if group == "" {
		return access, nil
	}
	found, err := user.LookupGroup(group)
	if err != nil {
		if found, err = user.LookupGroupId(group); err != nil {
			return access, fmt.Errorf("group %q is not known to this host", group)
		}
	}
	if access.gid, err = strconv.Atoi(found.Gid); err != nil {
		return access, fmt.Errorf("group %q: gid %q is not a number", group, found.Gid)
	}
	return access, nil
}

func (a Access) allows(caller Caller) bool {
	return caller.UID == 0 || caller.UID == a.uid || a.gid >= 0 && slices.Contains(caller.GIDs, a.gid)
}

// Caller is who is at the other end of a unix socket, as the kernel tells: it
// is the AuthInfo of such connections.
type Caller struct {
	credentials.CommonAuthInfo
	UID int
	// GIDs are all of the process's groups when it connected.
	GIDs    []int
	refused bool
}

// AuthType is part of credentials.AuthInfo.
func (Caller) AuthType() string { return "unix" }

// doors are the server's transport credentials: each kind of connection has
// its own way of saying who calls.
type doors struct {
	access Access
	tls    *TLS
	log    *slog.Logger
}

// ServerHandshake identifies a caller. One that may not is let in so far that
// admit can tell it so: a connection that is just closed tells it nothing.
func (d *doors) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	switch c := conn.(type) {
	case *net.UnixConn:
		caller, err := peerOf(c)
		if err != nil {
			return nil, nil, fmt.Errorf("peer credentials: %w", err)
		}
		caller.SecurityLevel = credentials.PrivacyAndIntegrity
		if caller.refused = !d.access.allows(caller); caller.refused {
			d.log.Warn("caller refused", "uid", caller.UID, "gids", caller.GIDs)
		}
		return conn, caller, nil
	case *net.TCPConn:
		if d.tls == nil {
			return nil, nil, errors.New("tcp without tls is not served")
		}
		secured, info, err := d.tls.credentials.ServerHandshake(conn)
		if err != nil {
			d.log.Warn("caller refused", "remote", conn.RemoteAddr().String(), "err", err)
		}
		return secured, info, err
	default:
		return nil, nil, fmt.Errorf("%T is not served", conn)
	}
}

// admit answers each request of a refused caller before anything of it is
// read, whatever service it is for. Any other caller proved itself.
func admit(ctx context.Context, _ *tap.Info) (context.Context, error) {
	p, ok := peer.FromContext(ctx)
	if !ok || p.AuthInfo == nil {
		return ctx, statusError(ctx, fmt.Errorf("caller is not known: %w", sandbox.ErrDenied), "")
	}
	if caller, ok := p.AuthInfo.(Caller); ok && caller.refused {
		return ctx, statusError(ctx, fmt.Errorf(
			"%w: uid %d is neither root, nor the agent's own user, nor a member of its group", sandbox.ErrDenied, caller.UID), "")
	}
	return ctx, nil
}

// ClientHandshake is part of credentials.TransportCredentials.
func (d *doors) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these are a server's credentials")
}

// Info is part of credentials.TransportCredentials.
func (d *doors) Info() credentials.ProtocolInfo { return credentials.ProtocolInfo{} }

// Clone is part of credentials.TransportCredentials.
func (d *doors) Clone() credentials.TransportCredentials {
	clone := *d
	return &clone
}

// OverrideServerName is part of credentials.TransportCredentials.
func (d *doors) OverrideServerName(string) error { return nil }
