package forward

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// pollLeft asks poll(2) to tell when the other end sends no more.
const pollLeft = unix.POLLRDHUP

// pipeSize is what a pipe holds if the kernel lets it; see F_SETPIPE_SZ in
// fcntl(2) and pipe-user-pages-soft in pipe(7).
const pipeSize = 512 << 10

// pipe is what splice(2) needs between two sockets.
type pipe struct{ r, w, n int }

func newPipe() *pipe {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil
	}
	_, _ = unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize) // else 64 KiB
	return &pipe{r: fds[0], w: fds[1]}
}

func (p *pipe) close() {
	unix.Close(p.r)
	unix.Close(p.w)
}

// bulk moves data by splice(2) for as long as more is there at once. It
// returns nil when there is not, and io.EOF at the end.
func (p *pump) bulk() error {
	if p.from.raw == nil || p.to.raw == nil {
		return nil
	}
	if p.pipe = p.buffers.getPipe(); p.pipe == nil {
		return nil
	}
	defer func() {
		p.buffers.putPipe(p.pipe)
		p.pipe = nil
	}()
	for {
		p.err = nil
		if err := p.from.raw.Read(p.fillStep); err != nil {
			return err
		}
		switch {
		case errors.Is(p.err, unix.EAGAIN):
			return nil
		case p.err != nil:
			return p.err
		case p.pipe.n == 0:
			return io.EOF
		}
		if err := p.push(p.drainStep, func() bool { return p.pipe.n == 0 }); err != nil {
			return err
		}
	}
}

// fill is a step of bulk: it never waits.
func (p *pump) fill(fd uintptr) bool {
	n, err := retry(func() (int64, error) {
		return unix.Splice(int(fd), nil, p.pipe.w, nil, pipeSize, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
	})
	if err != nil {
		p.err = os.NewSyscallError("splice", err)
		return true
	}
	p.pipe.n = int(n)
	return true
}

// drain is a step of push.
func (p *pump) drain(fd uintptr) bool {
	for p.pipe.n > 0 {
		n, err := retry(func() (int64, error) {
			return unix.Splice(p.pipe.r, nil, int(fd), nil, p.pipe.n, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		})
		if errors.Is(err, unix.EAGAIN) {
			return !p.patient
		}
		if err != nil {
			p.err = os.NewSyscallError("splice", err)
			return true
		}
		p.pipe.n -= int(n)
		p.count.Add(uint64(n))
	}
	return true
}
