package server_test

import (
	"context"
	"errors"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/server"
)

// connectAs connects as another user, in a thread that takes that user's
// identity, which on Linux is a thread's own, and dies with it.
func connectAs(uid, gid int, groups []uint32, path string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		conn, err := func() (net.Conn, error) {
			// The groups of this thread alone, where setgroups(2) of the
			// libraries sets those of all.
			var first unsafe.Pointer
			if len(groups) > 0 {
				first = unsafe.Pointer(&groups[0])
			}
			if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(first), 0); errno != 0 {
				return nil, errno
			}
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)); errno != 0 {
				return nil, errno
			}
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
				return nil, errno
			}
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return nil, err
			}
			file := os.NewFile(uintptr(fd), path)
			defer file.Close()
			if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
				return nil, err
			}
			return net.FileConn(file)
		}()
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

func TestOnlyThoseWhoMayAreServed(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 { // who cannot become somebody else
		servesOrRefusesMe(t)
		return
	}
	const stranger, member = 54321, 54322
	var log logged
	agent := startAgent(t, agentOptions{
		Drivers: processes(t), Server: server.Config{Access: access(t, "daemon")}, Log: &log,
	})
	group, err := user.LookupGroup("daemon")
	if err != nil {
		t.Fatal(err)
	}
	daemon, err := strconv.Atoi(group.Gid)
	if err != nil {
		t.Fatal(err)
	}
	for file, mode := range map[string]os.FileMode{agent.Socket: os.ModeSocket | 0o660, filepath.Dir(agent.Socket): os.ModeDir | 0o750} {
		info, err := os.Stat(file)
		if err != nil || info.Mode() != mode || int(info.Sys().(*syscall.Stat_t).Gid) != daemon {
			t.Errorf("%s: %v, %v", file, info, err)
		}
	}
	// The folders above are the test's, closed to everybody; and the mode of
	// the socket is opened to show that it is not what protects it.
	for _, dir := range []string{filepath.Dir(filepath.Dir(agent.Socket)), filepath.Dir(agent.Socket)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := connectAs(stranger, stranger, nil, agent.Socket); !errors.Is(err, unix.EACCES) {
		t.Errorf("a stranger connects: %v", err)
	}
	if err := os.Chmod(agent.Socket, 0o666); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name     string
		uid, gid int
		groups   []uint32
		refused  bool
	}{
		{"root", 0, 0, nil, false},
		{"member by primary group", member, daemon, nil, false},
		{"member by another group", member, member, []uint32{7, uint32(daemon)}, false},
		{"stranger", stranger, stranger, []uint32{7}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn, err := grpc.NewClient("passthrough:agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
					return connectAs(test.uid, test.gid, test.groups, agent.Socket)
				}))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_, unary := agentv1.NewHostServiceClient(conn).GetInfo(t.Context(), &agentv1.GetInfoRequest{})
			_, healthy := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
			stream, streaming := agentv1.NewSandboxServiceClient(conn).WatchSandboxes(t.Context(), &agentv1.WatchSandboxesRequest{})
			if streaming == nil {
				_, streaming = stream.Recv()
			}
			for _, err := range []error{unary, healthy, streaming} {
				if test.refused {
					wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")
				} else if err != nil {
					t.Error(err)
				}
			}
		})
	}
	if !log.contains("caller refused") || !log.contains("uid=54321") {
		t.Error("the refusal is not logged")
	}
}

// servesOrRefusesMe has agents of other users', with and without a group of
// this one's.
func servesOrRefusesMe(t *testing.T) {
	t.Helper()
	other := os.Getuid() + 1
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	for _, gid := range append(groups, -1) {
		var log logged
		agent := startAgent(t, agentOptions{
			Drivers: processes(t), Server: server.Config{Access: server.AccessOf(other, gid)}, Log: &log,
		})
		_, err := dial(t, agent).host.GetInfo(t.Context(), &agentv1.GetInfoRequest{})
		if gid >= 0 {
			if err != nil {
				t.Errorf("as a member of group %d: %v", gid, err)
			}
			continue
		}
		wantError(t, err, codes.PermissionDenied, "PERMISSION_DENIED", "")
		if !log.contains("caller refused") {
			t.Error("the refusal is not logged")
		}
	}
}
