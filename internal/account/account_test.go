package account

import "testing"

func TestUsersAreWhomTheImageSays(t *testing.T) {
	t.Parallel()
	const (
		passwd = "root:x:0:0:root:/root:/bin/sh\n\nbroken\napp:x:1000:1001::/home:/bin/sh\n1234:x:7:8::/:/x\nlast:x:5:6:::"
		group  = "root:x:0:\nstaff:x:50:app\n60:x:61:\n"
	)
	for user, want := range map[string]ID{
		"":           {0, 0},
		"root":       {0, 0},
		"0":          {0, 0},
		"root:root":  {0, 0},
		"0:50":       {0, 50},
		"root:staff": {0, 50},
		"app":        {1000, 1001},
		"app:staff":  {1000, 50},
		"app:7":      {1000, 7},
		"1000":       {1000, 1001}, // whose group passwd knows
		"2000":       {2000, 0},
		"2000:60":    {2000, 61}, // a name goes before a number
		"1234":       {7, 8},
		"last":       {5, 6},
	} {
		got, err := In(user, passwd, group)
		if err != nil || got != want {
			t.Errorf("%q is %+v, %v; want %+v", user, got, err, want)
		}
		if early, ok := Of(user); ok && early != want && user != "2000:60" {
			t.Errorf("%q is %+v without the image; want %+v", user, early, want)
		}
	}
	for _, user := range []string{"nobody", "app:nogroup", "-1", "99999999999"} {
		if got, err := In(user, passwd, group); err == nil {
			t.Errorf("%q is %+v, want an error", user, got)
		}
	}
	if got, err := In("0", "", ""); err != nil || got != (ID{}) {
		t.Errorf("root of an image without users is %+v, %v", got, err)
	}
}

func FuzzIn(f *testing.F) {
	f.Add("app:staff", "app:x:1000:1001::/:/x\n", "staff:x:50:\n")
	f.Fuzz(func(_ *testing.T, user, passwd, group string) { _, _ = In(user, passwd, group) })
}
