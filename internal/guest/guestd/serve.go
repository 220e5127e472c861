//go:build linux

package guestd

import (
	"container/list"
	"context"
	"crypto/subtle"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

const (
	// maxConnections is how many are served at a time.
	maxConnections = 1024
	// requestLimit is how long a peer may take to send its request.
	requestLimit = 10 * time.Second
	// farewellLimit is how long the agent may take to close a connection on
	// which all has been said.
	farewellLimit = 10 * time.Second
)

// server is guestd once it listens.
type server struct {
	children *processes
	workload *workload
	execs    *execs
	calls    map[string]call
	queue    queue
	// ready is closed once there is a sandbox to do something in, or there will
	// be none, for fault's reason.
	ready chan struct{}
	fault error
	// key is what connections begin with, once keyed is closed.
	key     atomic.Pointer[[]byte]
	keyed   chan struct{}
	keyOnce sync.Once
}

func newServer(o options, first bool) *server {
	s := &server{children: newProcesses(first), ready: make(chan struct{}), keyed: make(chan struct{})}
	if !o.machine {
		close(s.ready)
		s.rekey(nil)
	}
	buffers := newBuffers()
	s.workload = newWorkload(o, first, s.children, buffers)
	s.execs = newExecs(s.children, s.workload, buffers)
	s.calls = s.table()
	return s
}

// serve accepts connections until the listener fails, which it does once it is
// closed.
func (s *server) serve(ctx context.Context, channel *channel) {
	for {
		conn, err := channel.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			// Out of descriptors, most likely: those that wait make room.
			s.queue.evict()
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if channel.admits(conn) != nil {
			conn.Close()
			continue
		}
		waiting, ok := s.queue.enter(conn)
		if !ok {
			refuse(conn)
			continue
		}
		go s.converse(ctx, conn, waiting)
	}
}

// refuse tells a peer that it is one too many, if that does not take waiting.
func refuse(conn net.Conn) {
	defer conn.Close()
	_ = conn.SetWriteDeadline(time.Now().Add(time.Millisecond))
	_ = wire.New(conn, 0).Send(response(failuref(guestv1.Failure_CODE_EXHAUSTED, "%d connections are open, which is the most", maxConnections)))
}

// converse serves one connection.
func (s *server) converse(ctx context.Context, netConn net.Conn, waiting *list.Element) {
	defer netConn.Close()
	defer s.queue.leave(waiting)
	conn := wire.New(netConn, wire.MaxFrame)
	_ = netConn.SetReadDeadline(time.Now().Add(requestLimit))
	if !s.hasKey(ctx, netConn) {
		return
	}
	var request guestv1.Request
	err := conn.ReceiveMessage(&request)
	s.queue.spoken(waiting)
	switch {
	case errors.Is(err, wire.ErrProtocol):
		_ = conn.Send(response(failuref(guestv1.Failure_CODE_INVALID, "%v", err)))
		return
	case err != nil:
		return
	}
	_ = netConn.SetReadDeadline(time.Time{})
	call, known := s.calls[callName(&request)]
	if !known {
		_ = conn.Send(response(failuref(guestv1.Failure_CODE_UNIMPLEMENTED, "this guestd does not know the call")))
		return
	}
	if call.watched {
		var stop func()
		ctx, stop = watch(ctx, netConn)
		defer stop()
	}
	if !call.early {
		asked := time.Now()
		err = s.awaitReady(ctx)
		catchUp(&request, time.Since(asked))
	}
	if err == nil {
		err = call.handle(ctx, conn, &request)
	}
	if err != nil {
		_ = conn.Send(response(err))
	}
}

// catchUp has a request that had to wait tell what time it is by now.
func catchUp(request *guestv1.Request, waited time.Duration) {
	for _, t := range []*timestamppb.Timestamp{
		request.GetConfigure().GetTime(), request.GetRejoin().GetTime(), request.GetSetTime().GetTime(),
	} {
		if t.CheckValid() == nil {
			now := timestamppb.New(t.AsTime().Add(waited))
			t.Seconds, t.Nanos = now.GetSeconds(), now.GetNanos()
		}
	}
}

// hasKey reads the key that a connection begins with, once there is one, and
// reports whether it is the right one.
func (s *server) hasKey(ctx context.Context, conn net.Conn) bool {
	select {
	case <-s.keyed:
	case <-time.After(requestLimit):
		return false
	case <-ctx.Done():
		return false
	}
	key := *s.key.Load()
	given := make([]byte, len(key))
	_, err := io.ReadFull(conn, given)
	return err == nil && subtle.ConstantTimeCompare(given, key) == 1
}

// rekey has connections begin with another key from now on.
func (s *server) rekey(key []byte) {
	s.key.Store(&key)
	s.keyOnce.Do(func() { close(s.keyed) })
}

// awaitReady returns once there is a sandbox, or an error if there will be none.
func (s *server) awaitReady(ctx context.Context) error {
	select {
	case <-s.ready:
		return s.fault
	case <-ctx.Done():
		return ctx.Err()
	}
}

// watch returns a context that ends with ctx and when the peer closes the
// connection, or sends what it was not asked for. stop ends the watching.
func watch(ctx context.Context, conn net.Conn) (watched context.Context, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var watcher sync.WaitGroup
	watcher.Go(func() {
		defer cancel()
		_, _ = io.ReadFull(conn, make([]byte, 1))
	})
	return ctx, func() {
		_ = conn.SetReadDeadline(time.Unix(1, 0))
		watcher.Wait()
	}
}

// queue holds the connections: those that have yet to say what they want, the
// oldest first, and the number of all. The former make room for new ones, so
// that peers that connect and say nothing keep nobody out.
type queue struct {
	mu     sync.Mutex
	silent list.List // of net.Conn
	all    int
}

// enter makes room for a connection, unless all that there are are in use.
func (q *queue) enter(conn net.Conn) (*list.Element, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.all >= maxConnections && !q.evictLocked() {
		return nil, false
	}
	q.all++
	return q.silent.PushBack(conn), true
}

// evict closes the connection that has been silent for longest.
func (q *queue) evict() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.evictLocked()
}

func (q *queue) evictLocked() bool {
	oldest := q.silent.Front()
	if oldest == nil {
		return false
	}
	if conn, ok := q.silent.Remove(oldest).(net.Conn); ok {
		conn.Close()
	}
	return true
}

// spoken notes that a connection has said what it wants. For one that is not
// silent any more it does nothing.
func (q *queue) spoken(e *list.Element) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.silent.Remove(e)
}

func (q *queue) leave(e *list.Element) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.silent.Remove(e)
	q.all--
}
