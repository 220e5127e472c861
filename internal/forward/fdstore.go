package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// FDStore is systemd's descriptor store of the agent's service, as a Keeper.
// The unit needs FileDescriptorStoreMax=, see systemd.service(5); descriptors
// beyond that are dropped without a word. What it keeps comes back through
// LISTEN_FDS at the next start.
type FDStore struct {
	// Socket is $NOTIFY_SOCKET; one that begins with @ is abstract.
	Socket string
	// Timeout bounds each call; zero: 5 s.
	Timeout time.Duration
}

var _ Keeper = FDStore{}

// Keep implements Keeper.
func (s FDStore) Keep(name string, socket syscall.Conn) error {
	if err := checkName(name); err != nil {
		return err
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return fmt.Errorf("keep %s: %w", name, err)
	}
	var sent error
	err = raw.Control(func(fd uintptr) { sent = s.send("FDSTORE=1\nFDNAME="+name, int(fd)) })
	if err := errors.Join(err, sent); err != nil {
		return fmt.Errorf("keep %s: %w", name, err)
	}
	return nil
}

// Forget implements Keeper. It knows that the socket is closed by a barrier:
// systemd closes the descriptor that comes with it once it has handled all
// that came before; see sd_notify_barrier(3).
func (s FDStore) Forget(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	if err := s.send("FDSTOREREMOVE=1\nFDNAME=" + name); err != nil {
		return fmt.Errorf("forget %s: %w", name, err)
	}
	if err := s.barrier(); err != nil {
		return fmt.Errorf("forget %s: wait for the service manager: %w", name, err)
	}
	return nil
}

func (s FDStore) barrier() error {
	here, there, err := os.Pipe()
	if err != nil {
		return err
	}
	defer here.Close()
	raw, err := there.SyscallConn()
	if err != nil {
		return errors.Join(err, there.Close())
	}
	var sent error
	err = raw.Control(func(fd uintptr) { sent = s.send("BARRIER=1", int(fd)) })
	if err := errors.Join(err, sent, there.Close()); err != nil {
		return err
	}
	if err := here.SetReadDeadline(time.Now().Add(s.timeout())); err != nil {
		return err
	}
	if _, err := here.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

func (s FDStore) timeout() time.Duration {
	if s.Timeout > 0 {
		return s.Timeout
	}
	return 5 * time.Second
}

// send sends one message with the descriptors.
func (s FDStore) send(message string, fds ...int) error {
	ctx, cancel := context.WithTimeout(context.Background(), s.timeout())
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unixgram", s.Socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	// WriteMsgUnix refuses a datagram socket that is connected.
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Write(func(fd uintptr) bool {
		sent = unix.Sendmsg(int(fd), []byte(message), rights, nil, unix.MSG_DONTWAIT)
		return !errors.Is(sent, unix.EAGAIN)
	})
	return errors.Join(err, os.NewSyscallError("sendmsg", sent))
}

// checkName refuses what sd_pid_notify_with_fds(3) does not allow.
func checkName(name string) error {
	if name == "" || len(name) > 255 || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == ':' }) {
		return fmt.Errorf("keep: %q cannot be a descriptor's name", name)
	}
	return nil
}
