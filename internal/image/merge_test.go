package image

import (
	"archive/tar"
	"errors"
	"maps"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/sandbox"
)

func xattr(name, value string) func(h *tar.Header) {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = value
	}
}

// layers is a stack of them, the lowest first.
type layers [][]item

func TestRootHasWhatTheLayersMake(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("n", 255)
	big := strings.Repeat("0123456789abcdef", 1000)
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	acl := "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff"
	for name, tc := range map[string]struct {
		layers layers
		want   []string
	}{
		"no layer":       {layers{}, nil},
		"an empty layer": {layers{{}}, nil},
		"files and folders": {
			layers{{dir("a/"), text("a/f", "x"), text("empty", ""), text("big", big)}},
			[]string{"a/", `a/f "x"`, "big 16000 bytes " + digestOf([]byte(big))[:15], `empty ""`},
		},
		"names that begin oddly": {
			layers{{text("./a", "1"), text("/b", "2"), text("c/../d", "3"), text("!first", "4"), text("...", "5"), dir("./"), text("\xff\xfe", "6")}},
			[]string{"./", `!first "4"`, `... "5"`, `a "1"`, `b "2"`, `d "3"`, "\xff\xfe" + ` "6"`},
		},
		"the root itself": {
			layers{{dir("/").with(func(h *tar.Header) { h.Mode, h.Uid, h.Gid = 0o1711, 3, 4 })}},
			[]string{". dtrwx--x--x 3:4"},
		},
		"modes, owners and times": {
			layers{{
				text("sudo", "").with(func(h *tar.Header) { h.Mode, h.Uid, h.Gid = 0o6755, 100000, 4294967294 }),
				text("early", "").with(func(h *tar.Header) { h.ModTime = time.Unix(-5, 0); h.Format = tar.FormatPAX }),
				text("late", "").with(func(h *tar.Header) { h.ModTime = time.Unix(1<<33, 123456789); h.Format = tar.FormatPAX }),
				text("zero", "").with(func(h *tar.Header) { h.ModTime = time.Unix(0, 0) }),
			}},
			[]string{`early at -5000000000 ""`, `late at 8589934592123456789 ""`, `sudo ugrwxr-xr-x 100000:4294967294 ""`, `zero at 0 ""`},
		},
		"folders that are not mentioned": {
			layers{{text("a/b/c", "x")}},
			[]string{"a/ at 0", "a/b/ at 0", `a/b/c "x"`},
		},
		"the last of several": {
			layers{{text("a", "1"), text("a", "2")}, {text("a", "3"), text("a", "4")}},
			[]string{`a "4"`},
		},
		"a file becomes a folder and back": {
			layers{{text("a", "1"), dir("b"), text("b/c", "2")}, {dir("a"), text("a/x", "3"), text("b", "4")}},
			[]string{"a/", `a/x "3"`, `b "4"`},
		},
		"a folder's attributes change and its content stays": {
			layers{{dir("a"), text("a/f", "1")}, {dir("a").with(func(h *tar.Header) { h.Mode, h.Uid = 0o700, 7 })}},
			[]string{"a drwx------ 7:0", `a/f "1"`},
		},
		"what an upper layer has in a folder leaves the folder as it was": {
			layers{{dir("a").with(func(h *tar.Header) { h.Mode = 0o700 })}, {text("a/f", "1")}},
			[]string{"a drwx------ 0:0", `a/f "1"`},
		},
		"whiteouts": {
			layers{{text("a", "1"), dir("d"), text("d/x", "2"), text("d/y", "3")}, {text(".wh.a", ""), text("d/.wh.x", ""), text(".wh.absent", ""), text("no/.wh.x", "")}},
			[]string{"d/", `d/y "3"`},
		},
		"a whiteout of a folder": {
			layers{{text("d/e/f", "1"), text("k", "2")}, {text(".wh.d", "")}},
			[]string{`k "2"`},
		},
		"a whiteout spares its own layer": {
			layers{{text("a", "1"), text("d/old", "2")}, {text("a", "3"), text(".wh.a", ""), text("d/new", "4"), text(".wh.d", "")}},
			[]string{`a "3"`, "d/ at 0", `d/new "4"`},
		},
		"a whiteout before what takes its place": {
			layers{{text("d/old", "1")}, {text(".wh.d", ""), dir("d"), text("d/new", "2")}},
			[]string{"d/", `d/new "2"`},
		},
		"an opaque folder, said first": {
			layers{{text("d/old", "1"), text("d/sub/old", "2")}, {dir("d"), text("d/.wh..wh..opq", ""), text("d/new", "3"), text("d/sub/new", "4")}},
			[]string{"d/", `d/new "3"`, "d/sub/ at 0", `d/sub/new "4"`},
		},
		"an opaque folder, said last": {
			layers{{text("d/old", "1"), text("d/sub/old", "2")}, {dir("d"), text("d/new", "3"), text("d/sub/new", "4"), text("d/.wh..wh..opq", "")}},
			[]string{"d/", `d/new "3"`, "d/sub/ at 0", `d/sub/new "4"`},
		},
		"an opaque root": {
			layers{{text("a", "1"), text("b/c", "2")}, {text(".wh..wh..opq", ""), text("n", "3")}, {text("m", "4")}},
			[]string{`m "4"`, `n "3"`},
		},
		"aufs's own files": {
			layers{{text(".wh..wh.aufs", ""), dir(".wh..wh.plnk"), text(".wh..wh.plnk/1.2", "x"), text("a", "1")}},
			[]string{`a "1"`},
		},
		"hard links": {
			layers{{text("a", "1"), hard("z/b", "a"), hard("c", "/z/b"), hard("d", "./x/../c")}},
			[]string{`a nlink 4 "1"`, "c nlink 4 same as a", "d nlink 4 same as a", "z/ at 0", "z/b nlink 4 same as a"},
		},
		"a hard link to what is removed above": {
			layers{{text("a", "1"), hard("b", "a"), hard("c", "a")}, {text(".wh.a", "")}},
			[]string{`b nlink 2 "1"`, "c nlink 2 same as b"},
		},
		"a hard link to what is replaced above": {
			layers{{text("a", "1"), hard("b", "a")}, {text("a", "2")}, {hard("c", "b"), text("b", "3")}},
			[]string{`a "2"`, `b "3"`, `c "1"`},
		},
		"a hard link to a lower layer's, which the same one removes": {
			layers{{text("a", "1")}, {hard("b", "a"), text(".wh.a", "")}},
			[]string{`b "1"`},
		},
		"hard links to what is no file": {
			layers{{
				soft("s", "target"), hard("s2", "s"),
				item{tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1, Devminor: 3, Mode: 0o644, ModTime: moment}, ""},
				hard("c2", "c"),
				item{tar.Header{Typeflag: tar.TypeFifo, Name: "p", Mode: 0o644, ModTime: moment}, ""},
				hard("p2", "p"),
			}},
			[]string{
				"c Dcrw-r--r-- 0:0 nlink 2 device 0x103", "c2 Dcrw-r--r-- 0:0 nlink 2 same as c",
				"p prw-r--r-- 0:0 nlink 2", "p2 prw-r--r-- 0:0 nlink 2 same as p", "s nlink 2 -> target", "s2 nlink 2 same as s",
			},
		},
		"devices": {
			layers{{
				item{tar.Header{Typeflag: tar.TypeBlock, Name: "b", Devmajor: 259, Devminor: 70000, Mode: 0o660, ModTime: moment}, ""},
			}},
			[]string{"b Drw-rw---- 0:0 device 0x11110370"},
		},
		"symbolic links to anywhere": {
			layers{{soft("a", "../../../etc/passwd"), soft("b", "/proc/1/root"), soft("c", strings.Repeat("x/", 2047))}},
			[]string{"a -> ../../../etc/passwd", "b -> /proc/1/root", "c -> " + strings.Repeat("x/", 2047)},
		},
		"nothing is written through a symbolic link": {
			layers{{dir("etc"), text("etc/passwd", "1"), soft("lib", "etc"), soft("same", "etc")}, {text("lib/passwd", "2"), soft("own", "etc"), text("own/passwd", "3")}},
			[]string{"etc/", `etc/passwd "1"`, "lib/ at 0", `lib/passwd "2"`, "own/ at 0", `own/passwd "3"`, "same -> etc"},
		},
		"extended attributes": {
			layers{{
				text("ping", "x").with(xattr("security.capability", capability)),
				dir("d").with(xattr("user.a", "1")).with(xattr("user.b", strings.Repeat("v", 5000))),
				text("acl", "").with(xattr(aclAccess, acl)),
				text("no", "").with(xattr("trusted.overlay.opaque", "y")).with(xattr("com.apple.x", "y")).with(xattr("user.", "y")),
			}},
			[]string{
				`acl "" system.posix_acl_access="\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff"`,
				`d/ user.a="1" user.b="` + strings.Repeat("v", 5000) + `"`, `no ""`,
				`ping "x" security.capability="\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"`,
			},
		},
		"long names": {
			layers{{text(long+"/"+long, "x")}},
			[]string{long + "/ at 0", long + "/" + long + ` "x"`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var stack [][]byte
			for _, items := range tc.layers {
				stack = append(stack, layerOf(t, items...))
			}
			path, err := rootOf(t, stack...)
			if err != nil {
				t.Fatal(err)
			}
			lines := list(t, path)
			if diff := cmp.Diff(tc.want, brief(lines)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			check(t, path, lines)
		})
	}
}

func TestLargeFoldersAndManyLinks(t *testing.T) {
	t.Parallel()
	var items []item
	for i := range 3000 {
		name := strings.Repeat("f", i%200+1) + "-" + time.Unix(int64(i), 0).UTC().Format("150405")
		items = append(items, text("d/"+name, strings.Repeat("c", i*7%9000)), hard("e/"+name, "d/"+name), dir("g/"+name))
	}
	path, err := rootOf(t, layerOf(t, items...))
	if err != nil {
		t.Fatal(err)
	}
	lines := list(t, path)
	if len(lines) != 3*3000+4 {
		t.Errorf("%d files", len(lines))
	}
	check(t, path, lines)
}

func TestLayersThatAreRefused(t *testing.T) {
	t.Parallel()
	var many []item
	for i := range maxXattrs + 1 {
		many = append(many, text("x", "").with(xattr("user."+strings.Repeat("x", i+1), "")))
	}
	all := many[0]
	for i := range many {
		maps.Copy(all.PAXRecords, many[i].PAXRecords)
	}
	for name, tc := range map[string]struct {
		entry item
		named string // what the error names
	}{
		"up":                    {text("../a", ""), `"../a"`},
		"up later":              {text("a/b/../../../c", ""), "leads out"},
		"up from the root":      {text("/../a", ""), `"/../a"`},
		"link out":              {hard("l", "../../etc/passwd"), `entry "l"`},
		"absolute link out":     {hard("l", "/../etc/passwd"), `entry "l"`},
		"link to nothing":       {hard("l", "/etc/passwd"), "not there"},
		"link to itself":        {hard("l", "l"), "not there"},
		"link to a folder":      {hard("l", "d"), "folder"},
		"link through a link":   {hard("l", "s/f"), "not there"},
		"link in place of root": {hard("/", "d/f"), "root"},
		"file in place of root": {soft(".", "x"), "root"},
		"whiteout of nothing":   {text("d/.wh.", ""), "whiteout"},
		"whiteout of itself":    {text("d/.wh..", ""), "whiteout"},
		"whiteout of parent":    {text("d/.wh...", ""), "whiteout"},
		"in a whiteout":         {text(".wh.d/x", ""), "whiteout"},
		"long name":             {text(strings.Repeat("n", 256), ""), "255"},
		"long path":             {text(strings.Repeat("n/", 2049)+"n", ""), "4096"},
		"deep path":             {text(strings.Repeat("n/", 512)+"x", ""), "deep"},
		"no target":             {soft("s2", ""), "symbolic link"},
		"long target":           {soft("s2", strings.Repeat("x", 4096)), "symbolic link"},
		"no owner":              {text("x", "").with(func(h *tar.Header) { h.Uid = 1 << 32 }), "owner"},
		"negative owner":        {text("x", "").with(func(h *tar.Header) { h.Gid = -1; h.Format = tar.FormatGNU }), "owner"},
		"no device":             {item{tar.Header{Typeflag: tar.TypeChar, Name: "x", Devmajor: 4096}, ""}, "device"},
		"unknown type":          {item{tar.Header{Typeflag: 'V', Name: "x"}, ""}, "unknown type"},
		"many attributes":       {all, "attributes"},
		"long attribute":        {text("x", "").with(xattr("user.x", strings.Repeat("v", 65536))), "attributes"},
		"long attribute name":   {text("x", "").with(xattr("user."+strings.Repeat("v", 256), "")), "attributes"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			below := layerOf(t, dir("d"), text("d/f", ""), soft("s", "d"))
			path, err := rootOf(t, below, layerOf(t, tc.entry))
			if !errors.Is(err, sandbox.ErrInvalid) || !strings.Contains(err.Error(), tc.named) || !strings.Contains(err.Error(), "layer 2 of 2: entry") {
				t.Errorf("%v; want one that names %s", err, tc.named)
			}
			if path != "" {
				t.Errorf("there is a root file system: %s", path)
			}
		})
	}
}

// A tree is bounded before it takes memory, whatever layers say.
func TestTreeIsBounded(t *testing.T) {
	t.Parallel()
	tree := newTree()
	tree.layer = 1
	tree.entries = maxEntries - 1
	if err := tree.put([]string{"a"}, &inode{}); err != nil {
		t.Error(err)
	}
	if err := tree.put([]string{"b"}, &inode{}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("one more: %v", err)
	}
	tree = newTree()
	tree.metadata = maxMetadata - 10
	if err := tree.put([]string{"a"}, &inode{kind: symlink, target: "0123456789"}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a long target: %v", err)
	}
	tree = newTree()
	for i := range maxSmall/(blockSize-1) + 1 {
		tree.root.children[strconv.Itoa(i)] = &entry{inode: &inode{size: blockSize - 1}}
	}
	tree.finish()
	if err := tree.checkSmall(); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("too much in small files: %v", err)
	}
}

// Emptying a folder again and again costs no more than once.
func TestWhiteoutsAreLinear(t *testing.T) {
	t.Parallel()
	const n = 50_000
	tree := newTree()
	tree.layer = 1
	began := time.Now()
	for i := range n {
		if err := tree.put([]string{"d", strconv.Itoa(i)}, &inode{}); err != nil {
			t.Fatal(err)
		}
	}
	for range n {
		tree.hideAll([]string{"d"})
		tree.hide([]string{"d"})
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	if left := len(tree.root.children["d"].inode.children); left != n {
		t.Errorf("%d files are left of %d", left, n)
	}
}

func TestSameImageGivesSameBytes(t *testing.T) {
	t.Parallel()
	var items []item
	for i := range 200 {
		items = append(items, text("d/"+time.Unix(int64(i), 0).UTC().Format("150405"), strings.Repeat("x", i*100)).with(xattr("user.x", "1")).with(xattr("user.y", "2")))
	}
	var made [2][]byte
	for i := range made {
		path, err := rootOf(t, layerOf(t, items...), layerOf(t, hard("h", "d/000005")))
		if err != nil {
			t.Fatal(err)
		}
		if made[i], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	if string(made[0]) != string(made[1]) {
		t.Error("two conversions of one image differ")
	}
	if id := made[0][superOffset+superUUID:][:16]; string(id) == string(make([]byte, 16)) {
		t.Error("it has no UUID")
	}
}
