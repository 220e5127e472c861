package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// model merges layers in the simplest way: a path has a value, and what is
// removed is looked for among all paths.
type model struct {
	layer int
	at    map[string]value
}

type value struct {
	kind  byte   // 'd', 'f' or 's'
	text  string // of a file: what it is; of a folder: whether a layer describes it
	layer int
}

// below returns the paths in a folder, and in those in it.
func (m *model) below(dir string) (paths []string) {
	for p := range m.at {
		if strings.HasPrefix(p, dir+"/") {
			paths = append(paths, p)
		}
	}
	return paths
}

func (m *model) remove(p string) {
	for _, q := range append(m.below(p), p) {
		delete(m.at, q)
	}
}

func (m *model) put(p string, v value) {
	for i, c := range p {
		if c != '/' || i == 0 {
			continue
		}
		if m.at[p[:i]].kind != 'd' {
			m.remove(p[:i])
			m.at[p[:i]] = value{'d', "implied", m.layer}
		}
	}
	v.layer = m.layer
	if v.kind != 'd' || m.at[p].kind != 'd' {
		m.remove(p)
	}
	m.at[p] = v
}

// hide removes all of the layers below that is in a folder, and then those
// folders of theirs that are empty.
func (m *model) hide(p string) {
	paths := m.below(p)
	slices.SortFunc(paths, func(a, b string) int { return len(b) - len(a) })
	for _, q := range paths {
		m.drop(q)
	}
}

func (m *model) drop(p string) {
	v, ok := m.at[p]
	switch {
	case !ok || v.layer == m.layer:
	case v.kind == 'd' && len(m.below(p)) > 0:
		m.at[p] = value{'d', "implied", m.layer}
	default:
		delete(m.at, p)
	}
}

// step is what two bytes of a program say: an entry of a layer.
func step(op, where byte, n int) (item, string) {
	names := []string{"a", "b", "c"}
	p := "/" + names[where%3]
	if where/3%2 == 1 {
		p += "/" + names[where/6%3]
		if where/18%2 == 1 {
			p += "/" + names[where/36%3]
		}
	}
	dirName, base := path.Split(p)
	switch op % 6 {
	case 0:
		return text(p, strconv.Itoa(n)), p
	case 1:
		return dir(p).with(func(h *tar.Header) { h.Mode = 0o700 }), p
	case 2:
		return soft(p, strconv.Itoa(n)), p
	case 3:
		return hard(p, "/"+names[op/6%3]), p
	case 4:
		return text(dirName+".wh."+base, ""), p
	}
	return text(p+"/.wh..wh..opq", ""), p
}

// apply does with the model what an entry says, and reports whether it can be.
func (m *model) apply(i item, p string) bool {
	switch base := path.Base(i.Name); {
	case base == whiteoutOpaque:
		if m.at[p].kind == 'd' {
			m.hide(p)
		}
	case strings.HasPrefix(base, whiteoutPrefix):
		m.hide(p)
		m.drop(p)
	case i.Typeflag == tar.TypeLink:
		v, ok := m.at[i.Linkname]
		if !ok || v.kind == 'd' {
			return false
		}
		m.put(p, v)
	case i.Typeflag == tar.TypeDir:
		m.put(p, value{kind: 'd', text: "described"})
	case i.Typeflag == tar.TypeSymlink:
		m.put(p, value{kind: 's', text: i.Linkname})
	default:
		m.put(p, value{kind: 'f', text: i.content})
	}
	return true
}

// shape describes a tree as the model does.
func shape(t *tree, content []byte) map[string]string {
	seen := map[string]string{}
	var walk func(dir string, in *inode)
	walk = func(dir string, in *inode) {
		for name, e := range in.children {
			p := dir + "/" + name
			switch n := e.inode; n.kind {
			case folder:
				seen[p] = "d implied"
				if n.mode == 0o700 {
					seen[p] = "d described"
				}
				walk(p, n)
			case symlink:
				seen[p] = "s " + n.target
			default:
				seen[p] = "f " + string(content[n.offset:n.offset+n.size])
			}
		}
	}
	walk("", t.root)
	return seen
}

// mergeBoth runs a program, two bytes for each entry, of which some begin a layer.
func mergeBoth(t *testing.T, program []byte) {
	t.Helper()
	m := model{layer: 1, at: map[string]value{}}
	var stack [][]item
	var current []item
	for i := 0; i+1 < len(program); i += 2 {
		if program[i]%8 == 7 {
			stack, current = append(stack, current), nil
			m.layer++
		}
		next, p := step(program[i]/8, program[i+1], i)
		if m.apply(next, p) {
			current = append(current, next)
		}
	}
	stack = append(stack, current)

	var content bytes.Buffer
	tree, sink := newTree(), &scratch{out: bufio.NewWriter(&content)}
	left := int64(1 << 20)
	var said []string
	for n, items := range stack {
		for _, i := range items {
			said = append(said, fmt.Sprintf("%d: %c %s %s", n+1, i.Typeflag, i.Name, i.Linkname))
		}
		if err := tree.applyTar(bytes.NewReader(layerOf(t, items...)), sink, &left); err != nil {
			t.Fatalf("%v in\n%s", err, strings.Join(said, "\n"))
		}
	}
	if err := sink.out.Flush(); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	for p, v := range m.at {
		want[p] = string(v.kind) + " " + v.text
	}
	if diff := cmp.Diff(want, shape(tree, content.Bytes())); diff != "" {
		t.Fatalf("-model +tree:\n%s\nof\n%s", diff, strings.Join(said, "\n"))
	}
}

func TestMergeIsAsTheModel(t *testing.T) {
	t.Parallel()
	random := rand.NewChaCha8([32]byte{2})
	for range 3000 {
		program := make([]byte, 60)
		if _, err := random.Read(program); err != nil {
			t.Fatal(err)
		}
		mergeBoth(t, program)
	}
}

// FuzzMergeModel lets the fuzzer write the layers.
func FuzzMergeModel(f *testing.F) {
	f.Add([]byte("some layers, one upon the other"))
	f.Fuzz(mergeBoth)
}
