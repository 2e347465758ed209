"""TCP in userspace mode: accept, dial, and move bytes between two sockets by splice(2), without looking at them.

::

    client socket ── splice ──▶ pipe ── splice ──▶ backend socket        and the same the other way

A pipe is borrowed while bytes are on their way and given back when it is empty, so a connection at rest holds two
descriptors. Sockets are registered once, edge-triggered: each direction is moved until the kernel has no more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
from typing import Final

from testbed.dataplane.balancer import Dial, Rotation
from testbed.programs.userspace_loop import Loop, Notice, Timer

#: What a pipe takes at once. Larger ones gain nothing here (docs/adr/0010-userspace-copying.md).
_PIPE_BYTES: Final = 1 << 18
#: Pipes that are kept: bytes must go on moving when there are no descriptors left.
_PIPES_KEPT: Final = 32
_ROUNDS: Final = 16  # of one direction, before others have their turn
_ACCEPTED_AT_ONCE: Final = 64
_F_SETPIPE_SZ: Final = 1031  # linux/fcntl.h
_SPLICE: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_EDGES: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET
_GONE: Final = select.EPOLLERR | select.EPOLLHUP
_SOCKET: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
#: The process or the machine has no descriptor, or no memory for one.
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

Pipe = tuple[int, int]


class Pipes:
    """Empty pipes to borrow."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._free = [_make_pipe() for _ in range(_PIPES_KEPT)]
        self._waiting: list[Way] = []

    def borrow(self, way: Way) -> Pipe | None:
        """Return an empty pipe, or None: then ``way`` is moved on when there is one."""
        if self._free:
            return self._free.pop()
        try:
            return _make_pipe()
        except OSError:
            self._waiting.append(way)
            return None

    def give_back(self, pipe: Pipe, *, is_empty: bool = True) -> None:
        if not is_empty:
            os.close(pipe[0])
            os.close(pipe[1])
            try:
                pipe = _make_pipe()
            except OSError:  # another thread of this process would have to take them; there is none
                return
        waiting, self._waiting = self._waiting, []
        for way in waiting:
            self._loop.again(way.move)
        if len(self._free) < _PIPES_KEPT or waiting:
            self._free.append(pipe)
        else:
            os.close(pipe[0])
            os.close(pipe[1])


def _make_pipe() -> Pipe:
    pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # above what the machine allows: 64 KiB do as well
        fcntl.fcntl(pipe[1], _F_SETPIPE_SZ, _PIPE_BYTES)
    return pipe


class Way:
    """One direction of a connection."""

    __slots__ = ("_held", "_pair", "_pipe", "_pipes", "_source", "_target")

    def __init__(self, pair: Pair, pipes: Pipes, source: int, target: int) -> None:
        self._pair = pair
        self._pipes = pipes
        self._source = source
        self._target = target
        self._pipe: Pipe | None = None
        self._held = 0  # bytes in the pipe

    @property
    def is_blocked(self) -> bool:
        """The target has not taken all that is on the way."""
        return self._held > 0

    def move(self) -> None:
        """Move bytes until the source has none, or the target takes none, or others should have their turn."""
        pair = self._pair
        if pair.is_closed:
            return
        if self._pipe is None:
            self._pipe = self._pipes.borrow(self)
            if self._pipe is None:
                return
        pipe, held = self._pipe, self._held
        read, write = pipe
        splice, source, target = os.splice, self._source, self._target
        try:
            for _ in range(_ROUNDS):
                if not held:
                    try:
                        held = splice(source, write, _PIPE_BYTES, flags=_SPLICE)
                    except BlockingIOError:
                        self._pipe, self._held = None, 0
                        self._pipes.give_back(pipe)
                        return
                    if not held:  # the first end closes both sides: half of a connection is not kept (copyBytes)
                        pair.close()
                        return
                try:
                    held -= splice(read, target, held, flags=_SPLICE)
                except BlockingIOError:
                    self._held = held
                    return
        except OSError:
            self._held = held
            pair.close()
            return
        self._held = held
        pair.loop.again(self.move)

    def end(self) -> None:
        """Give the pipe back."""
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            self._pipes.give_back(pipe, is_empty=not self._held)


class Pair:
    """A client's connection and the one to its endpoint."""

    __slots__ = ("_backend", "_backend_fd", "_client", "_client_fd", "_down", "_pair", "_up", "is_closed", "loop")

    def __init__(self, loop: Loop, pipes: Pipes, client: socket.socket, backend: socket.socket) -> None:
        self.loop = loop
        self.is_closed = False
        self._client, self._backend = client, backend
        self._pair = loop.note_pair(client, backend)
        self._client_fd, self._backend_fd = client.fileno(), backend.fileno()
        self._up = Way(self, pipes, self._client_fd, self._backend_fd)
        self._down = Way(self, pipes, self._backend_fd, self._client_fd)
        loop.hand_over(self._backend_fd, self)
        loop.watch(self._client_fd, self, _EDGES)

    def start(self) -> None:
        """Move what came before both sides were watched."""
        self._up.move()
        self._down.move()

    def on_event(self, fd: int, events: int) -> None:
        to_endpoint = fd == self._client_fd
        here, back = (self._up, self._down) if to_endpoint else (self._down, self._up)
        if events & _GONE and to_endpoint and here.is_blocked:
            self.close()  # nobody is left to read an answer, and the endpoint takes nothing
            return
        if events & select.EPOLLOUT and back.is_blocked:
            back.move()
        if events & ~select.EPOLLOUT:
            here.move()

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.loop.forget_pair(self._pair)
            self._up.end()
            self._down.end()
            self.loop.close(self._client, self._backend)


class _Dialing:
    """A client that waits for a connection to an endpoint."""

    __slots__ = ("_backend", "_client", "_dial", "_endpoint", "_port", "_timer")

    def __init__(self, port: TcpPort, client: socket.socket, dial: Dial) -> None:
        self._port = port
        self._client = client
        self._dial = dial
        self._backend: socket.socket | None = None
        self._timer: Timer | None = None
        self._endpoint = ""

    def next(self) -> None:
        """Dial the next endpoint; when there is none, close the client's connection."""
        loop = self._port.loop
        while True:
            try:
                backend = socket.socket(socket.AF_INET, _SOCKET)
            except OSError as error:
                if error.errno in EXHAUSTED:
                    loop.park(self.next, f"cannot connect to an endpoint of Service {self._port.name}")
                    return
                raise
            turn = self._dial.next(loop.now_s)
            if turn is None:
                backend.close()
                loop.close(self._client)
                if self._endpoint:
                    message = (
                        f"no endpoint of Service {self._port.name} answers; the last one tried was {self._endpoint}"
                    )
                    loop.tell_seldom(Notice("", f"Unreachable {self._port.name}", message))
                return
            loop.fed()
            self._endpoint = turn.endpoint
            address, _, number = turn.endpoint.rpartition(":")
            backend.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            backend.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            status = backend.connect_ex((address, int(number)))
            if status in (0, errno.EINPROGRESS):
                break
            backend.close()
        self._backend = backend
        self._timer = loop.at(loop.now_s + turn.timeout_s, self._give_up)
        loop.watch(backend.fileno(), self, _EDGES)

    def _give_up(self) -> None:
        if self._backend is not None:
            self._port.loop.close(self._backend)
            self._backend = None
            self.next()

    def on_event(self, fd: int, events: int) -> None:
        backend = self._backend
        if backend is None or not events & (select.EPOLLOUT | _GONE):
            return
        if self._timer is not None:
            self._timer.cancel()
        if events & _GONE or backend.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._give_up()
            return
        self._backend = None
        Pair(self._port.loop, self._port.pipes, self._client, backend).start()


class TcpPort:
    """The listening port of one service port."""

    def __init__(self, loop: Loop, pipes: Pipes, name: str, listener: socket.socket, rotation: Rotation) -> None:
        self.loop = loop
        self.pipes = pipes
        self.name = name
        self._listener = listener
        self._rotation = rotation
        listener.setblocking(False)
        loop.watch_listener(listener.fileno(), self)

    def on_event(self, fd: int, events: int) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                client, (address, _) = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self.loop.starve(f"cannot accept a connection to Service {self.name}")
                    return
                continue  # that connection is gone already; accept(2)
            client.setblocking(False)
            if not self._rotation.endpoints:
                client.close()  # accepted and closed at once, not refused
                continue
            _Dialing(self, client, Dial(self._rotation, address)).next()
            if self.loop.is_starved:
                return

    def close(self) -> None:
        """Take no new connections; established ones go on."""
        self.loop.close(self._listener)
