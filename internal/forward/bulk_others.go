//go:build !linux

package forward

// pollLeft: there is no such event here.
const pollLeft = 0

// pipe is of no use here.
type pipe struct{ n int }

func newPipe() *pipe { return nil }

func (p *pipe) close() {}

// bulk leaves all to be copied.
func (p *pump) bulk() error { return nil }

func (p *pump) fill(uintptr) bool { return true }

func (p *pump) drain(uintptr) bool { return true }
