package shim

import "testing"

func TestServicesOfUsersAreTold(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{
		"0::/user.slice/user-1000.slice/user@1000.service/app.slice/choiros-agent.service\n":                        true,
		"1:name=systemd:/x\n0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-x.slice/run-1.service\n": true,
		"0::/user.slice/user-1000.slice/user@1000.service/app.slice/choiros-web-17.scope\n":                         false,
		"0::/user.slice/user-1000.slice/user@1000.service/init.scope\n":                                             false,
		"0::/user.slice/user-1000.slice/user@1000.service\n":                                                        false,
		"0::/user.slice/user-1000.slice/session-3.scope\n":                                                          false,
		"0::/system.slice/choiros-agent.service\n":                                                                  false,
		"0::/\n": false, "": false, "12:devices:/user.slice\n": false,
	} {
		if got := isUserService(text); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
