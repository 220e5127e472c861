// Package drivertest is the contract of sandbox.Driver as tests, to be run on
// every driver, and on whatever stands for one: such as an adapter that goes
// through a client, the API and the manager to get there.
//
// The contract is what package sandbox says; this package adds nothing to it.
// It knows of no driver by name. Optional abilities are found by type
// assertion and tested where there are; what the way to a driver cannot carry
// is switched off in Harness.Without, each with its reason.
//
// Every step of every test opens a driver anew, as another process would, so
// that whatever a driver remembers in memory only fails at once. No test waits
// for a time to pass: each waits for a condition, until Harness.Patience.
//
// A driver's own test comes to this:
//
//	func TestMain(m *testing.M) {
//		drivertest.VerbMain(func(owner string) (sandbox.Driver, error) { return mine.New(owner) })
//		os.Exit(m.Run())
//	}
//
//	func TestContract(t *testing.T) {
//		drivertest.Run(t, drivertest.Harness{
//			Open: func(t *testing.T) sandbox.Driver { ... },
//			Spec: func(t *testing.T, w drivertest.Workload) sandbox.Spec {
//				return sandbox.Spec{Driver: "mine", Image: "workload", Command: w.Args, Mounts: w.Mounts, Env: w.Env}
//			},
//			GuestDir: "/run/guest",
//			Kill:     drivertest.VerbProcess(owner),
//		})
//	}
//
// One test measures goroutines and threads, so TestContract should not run in
// parallel with other tests of its package.
//
// It does not look at what a backend makes of a spec (limits, users, networks,
// read-only mounts): that is not in the contract, and each driver's own tests
// do it.
package drivertest
