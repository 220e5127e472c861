package vm_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/vmtest"
	"github.com/choiros/agent/test/image"
)

// openNAT opens a driver whose machines have a NAT for a network, which on a
// Mac is the framework's, and here QEMU's.
func openNAT(t *testing.T, root string) *vm.Driver {
	t.Helper()
	config, err := vmtest.Config(root, runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	config.NAT = true
	d, err := vm.New(config)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func natSpec() sandbox.Spec {
	return sandbox.Spec{
		Driver: "vm", Image: image.RootName, Command: []string{"sleep"}, Resources: vmtest.Resources(),
		DriverOptions: json.RawMessage(`{"disk_mib": 64}`),
	}
}

// wantRefusedOnNAT fails the test unless a policy was refused, with the cure.
func wantRefusedOnNAT(t *testing.T, what string, err error) {
	t.Helper()
	refused, ok := errors.AsType[*sandbox.FieldError](err)
	if !ok || refused.Field != "spec.egress" || !errors.Is(err, sandbox.ErrUnsupported) || !strings.Contains(refused.Problem, "set vm.network to stack") {
		t.Errorf("%s: %v, want a refusal of spec.egress", what, err)
	}
}

// TestPolicyThatANATCannotKeepIsRefused needs no machine to run.
func TestPolicyThatANATCannotKeepIsRefused(t *testing.T) {
	root := vmtest.Backend(t)
	d, stack := openNAT(t, root), open(t, root)
	ctx, ref := t.Context(), sandbox.Ref{ID: "kept", Dir: filepath.Join(t.TempDir(), "kept")}
	list := sandbox.Egress{Mode: sandbox.EgressList, Rules: []sandbox.EgressRule{{Name: "allowed.invalid"}}}
	for what, egress := range map[string]sandbox.Egress{
		"deny": {Mode: sandbox.EgressDeny}, "list": list, "deny-private": {DenyPrivate: true}, "allow, deny-private": {Mode: sandbox.EgressAllow, DenyPrivate: true},
	} {
		spec := natSpec()
		spec.Egress = egress
		wantRefusedOnNAT(t, "validate "+what, d.Validate(ctx, spec))
		wantRefusedOnNAT(t, "create "+what, d.Create(ctx, ref, spec))
	}
	if made, err := d.List(ctx); err != nil || len(made) > 0 {
		t.Errorf("there are %v, %v; want nothing of what was refused", made, err)
	}
	for what, egress := range map[string]sandbox.Egress{"nothing": {}, "allow": {Mode: sandbox.EgressAllow}} {
		spec := natSpec()
		spec.Egress = egress
		if err := d.Validate(ctx, spec); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}

	// One that was made when there was another network is not started.
	spec := natSpec()
	spec.Egress = list
	if err := stack.Create(ctx, ref, spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Delete(context.WithoutCancel(ctx), ref); err != nil {
			t.Error(err)
		}
	})
	wantRefusedOnNAT(t, "start", d.Start(ctx, ref))
	wantRefusedOnNAT(t, "set its policy", d.SetEgress(ctx, ref, sandbox.Egress{Mode: sandbox.EgressDeny}))
	wantRefusedOnNAT(t, "start, still", d.Start(ctx, ref))
	if seen, err := d.Inspect(ctx, ref); err != nil || seen.State != sandbox.StateCreated {
		t.Errorf("it is %+v, %v", seen, err)
	}
	if err := d.SetEgress(ctx, ref, sandbox.Egress{Mode: sandbox.EgressAllow}); err != nil {
		t.Errorf("allow everything: %v", err)
	}
	const warning = "vm.network is nat: no egress policy is kept"
	for what, c := range map[string]struct {
		driver *vm.Driver
		warns  bool
	}{"nat": {d, true}, "stack": {stack, false}} {
		report, err := c.driver.Probe(ctx)
		warned := slices.ContainsFunc(report.Warnings, func(w string) bool { return strings.HasPrefix(w, warning) })
		if err != nil || warned != c.warns {
			t.Errorf("%s reports %+v, %v", what, report, err)
		}
	}
}

// TestMachineOnNATIsGivenItsAddress boots a guest on a network with a DHCP
// server, as a Mac's NAT is: that of QEMU, where 10.0.2.2 is the host's loopback.
func TestMachineOnNATIsGivenItsAddress(t *testing.T) {
	if testing.Short() {
		t.Skip("it boots a machine")
	}
	root := vmtest.Backend(t)
	d, stack := openNAT(t, root), open(t, root)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	m := &macGuest{T: t, ctx: ctx, driver: d, ref: sandbox.Ref{ID: "nat", Dir: filepath.Join(t.TempDir(), "nat")}}
	m.guest = guest.New(m.ref.ID, func(ctx context.Context) (net.Conn, error) { return d.Dial(ctx, m.ref, guest.Port) })
	t.Cleanup(func() {
		if err := d.Delete(context.WithoutCancel(t.Context()), m.ref); err != nil {
			t.Error(err)
		}
	})
	m.must("create", d.Create(ctx, m.ref, natSpec()))
	began := time.Now()
	m.must("start", d.Start(ctx, m.ref))
	m.happens("guestd answers", func() bool {
		_, err := m.guest.Hello(ctx)
		return err == nil
	})
	m.must("configure", m.guest.Configure(ctx, guest.Configuration{Generation: 1, Hostname: "box"}))
	t.Logf("its workload is started %.1f s after Start was called", time.Since(began).Seconds())

	for file, want := range map[string]string{
		"/etc/resolv.conf": "nameserver 10.0.2.3\n",
		"/etc/hosts":       "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\tbox\n",
	} {
		if got := m.cat(file); got != want {
			t.Errorf("%s: %q, want %q", file, got, want)
		}
	}
	if table := m.cat("/proc/net/fib_trie"); !strings.Contains(table, "|-- 10.0.2.15\n") {
		t.Errorf("it has no address 10.0.2.15:\n%s", table)
	}
	// Destination, gateway and mask, each backwards: the net, and the rest.
	routes := m.cat("/proc/net/route")
	for _, want := range []string{"eth0\t00000000\t0202000A", "eth0\t0002000A\t00000000"} {
		if !strings.Contains(routes, want) {
			t.Errorf("routes: %s", routes)
		}
	}
	if mac := m.cat("/sys/class/net/eth0/address"); mac == "5a:94:ef:e4:0c:ee\n" {
		t.Error("its network device has the address that machines with a network of their own have, all of them")
	}
	m.reachesLoopback()

	// There is nothing that keeps a policy, whatever the next boot has.
	wantRefusedOnNAT(t, "set a policy", d.SetEgress(ctx, m.ref, sandbox.Egress{Mode: sandbox.EgressDeny}))
	if err := d.SetEgress(ctx, m.ref, sandbox.Egress{Mode: sandbox.EgressAllow}); err != nil {
		t.Errorf("allow everything: %v", err)
	}
	if err := stack.SetEgress(ctx, m.ref, sandbox.Egress{Mode: sandbox.EgressDeny}); err == nil || !strings.Contains(err.Error(), "from its next start on") {
		t.Errorf("set a policy with the next boot's network: %v", err)
	}
	m.stops()
}

// reachesLoopback connects from inside to a listener on this host's loopback.
func (m *macGuest) reachesLoopback() {
	m.Helper()
	var config net.ListenConfig
	listener, err := config.Listen(m.ctx, "tcp", "127.0.0.1:0")
	m.must("listen", err)
	defer listener.Close()
	accepted := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			err = conn.Close()
		}
		accepted <- err
	}()
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	if _, stderr, code := m.run("connect", fmt.Sprint("10.0.2.2:", port)); code != 0 {
		m.Fatalf("it does not reach this host: %s", stderr)
	}
	m.must("accept", <-accepted)
}
