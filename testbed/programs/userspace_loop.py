"""The process that carries userspace mode's traffic: one epoll loop, told by kube-proxy what to serve.

::

    kube-proxy ── socket pair ──▶ this process:  epoll ─┬─ listeners ── userspace_tcp: splice(2) between two sockets
     (opens listeners, writes      keeps a Rotation     └─ listeners ── userspace_udp: a socket for each client
      rules, starts us again)      per service port

Each message of the socket pair (SOCK_SEQPACKET) is one JSON list: a word, the service port's name, and what belongs to it;
``open`` brings the listening socket along. The other way go notices, for the log and for events. The process ends when
kube-proxy does.

Why one process with an epoll loop: docs/adr/0010-userspace-copying.md.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import random
import select
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple, Protocol

from testbed.dataplane.balancer import Rotation
from testbed.kernel.proxy_pairs import PairTable
from testbed.model.service import ServicePortName

#: How large a message may be: the endpoints of one service port.
MESSAGE_BYTES: Final = 1 << 20
#: While there is no file descriptor for a new connection, one is looked for so often.
STARVED_FIRST_S: Final = 0.05
STARVED_LAST_S: Final = 1.0
_EVENTS_AT_ONCE: Final = 1024


class Handler(Protocol):
    """What epoll's events about a descriptor go to."""

    def on_event(self, fd: int, events: int) -> None: ...


class Notice(NamedTuple):
    """Something that kube-proxy is to log, and to write an event about."""

    kind: str  # Normal, Warning
    reason: str
    message: str


class Timer:
    """A call that is due some time, unless it is cancelled."""

    __slots__ = ("call", "due_s")

    def __init__(self, due_s: float, call: Callable[[], None] | None) -> None:
        self.due_s = due_s
        self.call = call

    def __lt__(self, other: Timer) -> bool:
        return self.due_s < other.due_s

    def cancel(self) -> None:
        self.call = None


class Loop:
    """Descriptors and timers of one process, and what it does when there are no descriptors left.

    Args:
        notify: Passes a notice on to kube-proxy.
    """

    def __init__(self, notify: Callable[[Notice], None]) -> None:
        self.epoll = select.epoll()
        self.now_s = time.monotonic()
        self._notify = notify
        self._handlers: dict[int, Handler] = {}
        self._timers: list[Timer] = []
        self._closing: list[socket.socket] = []
        self._again: list[Callable[[], None]] = []
        self._accepting: dict[int, Handler] = {}
        self._starved = False
        self._back_off_s = STARVED_FIRST_S
        self._retry: Timer | None = None
        self._parked: list[Callable[[], None]] = []
        self._told_s: dict[str, float] = {}
        self._pairs: PairTable | None = None

    # -- what is carried -----------------------------------------------------------------------------------------------

    def show_pairs(self, pairs: PairTable) -> None:
        """Let others ask which connection was opened for which."""
        self._pairs = pairs
        self.watch(pairs.listener.fileno(), _Asked(pairs), select.EPOLLIN)

    def note_pair(self, client: socket.socket, backend: socket.socket) -> bytes:
        """Put a pair into the table; return what `forget_pair` wants."""
        return self._pairs.add(client, backend) if self._pairs is not None else b""

    def forget_pair(self, pair: bytes) -> None:
        if self._pairs is not None:
            self._pairs.remove(pair)

    # -- descriptors ---------------------------------------------------------------------------------------------------

    def watch(self, fd: int, handler: Handler, events: int) -> None:
        """Have a handler told of events of a descriptor, until `close`."""
        self._handlers[fd] = handler
        self.epoll.register(fd, events)

    def watch_listener(self, fd: int, handler: Handler) -> None:
        """The same for a socket that brings new connections: it rests while there are no descriptors for them."""
        self._accepting[fd] = handler
        self.watch(fd, handler, 0 if self._starved else select.EPOLLIN)

    def hand_over(self, fd: int, handler: Handler) -> None:
        """Have another handler told of the events of a watched descriptor."""
        self._handlers[fd] = handler

    def close(self, *sockets: socket.socket) -> None:
        """Close sockets once the events at hand are dealt with: before that, their numbers must not be given to others."""
        for one in sockets:
            fd = one.fileno()
            if fd >= 0:
                self._accepting.pop(fd, None)
                if self._handlers.pop(fd, None) is not None:
                    self.epoll.unregister(fd)  # kube-proxy may hold another descriptor of this socket
                self._closing.append(one)

    def again(self, call: Callable[[], None]) -> None:
        """Call after all others had their turn."""
        self._again.append(call)

    def at(self, due_s: float, call: Callable[[], None]) -> Timer:
        timer = Timer(due_s, call)
        heapq.heappush(self._timers, timer)
        return timer

    # -- out of descriptors --------------------------------------------------------------------------------------------

    def park(self, call: Callable[[], None], what: str) -> None:
        """Try again when there may be descriptors: nothing new is accepted until then."""
        self._parked.append(call)
        self.starve(what)

    def starve(self, what: str) -> None:
        """Stop accepting for a while: the kernel keeps what comes in waiting."""
        if not self._starved:
            self._starved = True
            for fd in self._accepting:
                self.epoll.modify(fd, 0)
        self.tell_seldom(
            Notice("Warning", "OutOfFileDescriptors", f"{what}: {_open_files()}; new connections wait until some end")
        )
        if self._retry is None:
            self._retry = self.at(self.now_s + self._back_off_s, self._feed)
            self._back_off_s = min(STARVED_LAST_S, self._back_off_s * 2)

    def _feed(self) -> None:
        """Accept again; who still gets no descriptor calls `starve` again."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        parked, self._parked = self._parked, []
        self._starved = False
        for fd in self._accepting:
            self.epoll.modify(fd, select.EPOLLIN)
        for call in parked:
            call()

    @property
    def is_starved(self) -> bool:
        """Nothing is accepted for want of descriptors."""
        return self._starved

    def fed(self) -> None:
        """Somebody got a descriptor for a new connection."""
        if self._back_off_s > STARVED_FIRST_S and not self._starved and not self._parked:
            self._back_off_s = STARVED_FIRST_S

    def tell_seldom(self, notice: Notice) -> None:
        """Pass a notice on, unless the same was told within ten seconds."""
        if self.now_s - self._told_s.get(notice.reason, -60.0) >= 10:
            self._told_s[notice.reason] = self.now_s
            self._notify(notice)

    # -- turning -------------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Wait for events or timers, and deal with them."""
        timers = self._timers
        timeout_s = 0.0 if self._again else max(0.0, timers[0].due_s - time.monotonic()) if timers else -1.0
        found = self.epoll.poll(timeout_s, _EVENTS_AT_ONCE)
        self.now_s = time.monotonic()
        handlers = self._handlers
        for fd, events in found:
            handler = handlers.get(fd)
            if handler is not None:
                handler.on_event(fd, events)
        while timers and timers[0].due_s <= self.now_s:
            timer = heapq.heappop(timers)
            if timer.call is not None:
                timer.call()
        again, self._again = self._again, []
        for call in again:
            call()
        if self._closing:
            closing, self._closing = self._closing, []
            for one in closing:
                one.close()
            if self._starved:
                self._feed()


class _Asked:
    """Somebody wants to know the table of pairs."""

    def __init__(self, pairs: PairTable) -> None:
        self._pairs = pairs

    def on_event(self, fd: int, events: int) -> None:
        self._pairs.accept()


def _open_files() -> str:
    import resource

    return f"all of the {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} file descriptors are in use"


class Copies(Protocol):
    """How the connections of one service port are carried: `userspace_tcp.TcpPort`, `userspace_udp.UdpPort`."""

    def close(self) -> None: ...


class Control:
    """Carries out kube-proxy's messages."""

    def __init__(self, loop: Loop, channel: socket.socket, make_port: Callable[..., Copies], seed: int) -> None:
        self._loop = loop
        self._channel = channel
        self._make_port = make_port
        self._shuffle = random.Random(seed).shuffle  # noqa: S311 (turns, no secrets)
        self._rotations: dict[ServicePortName, Rotation] = {}
        self._ports: dict[ServicePortName, list[Copies]] = {}
        self.has_ended = False
        loop.watch(channel.fileno(), self, select.EPOLLIN)

    def on_event(self, fd: int, events: int) -> None:
        data, descriptors, *_ = socket.recv_fds(self._channel, MESSAGE_BYTES, 1)
        if not data:
            self.has_ended = True  # kube-proxy has
            return
        word, name, *rest = json.loads(data)
        self._carry_out(word, ServicePortName(*name) if name else None, rest, descriptors)

    def _carry_out(self, word: str, name: ServicePortName | None, rest: list[Any], descriptors: Iterable[int]) -> None:
        if name is None:
            for rotation in self._rotations.values():
                rotation.purge(self._loop.now_s)
            return
        match word:
            case "open":
                [descriptor] = descriptors
                rotation = self._rotations.setdefault(name, Rotation())
                opened = self._make_port(name, socket.socket(fileno=descriptor), rotation)
                self._ports.setdefault(name, []).append(opened)
            case "set":
                endpoints, affinity_s = rest
                self._rotations[name].set_affinity(affinity_s)
                self._rotations[name].set_endpoints(endpoints, self._shuffle)
            case "leave":
                *left, newest = self._ports[name]
                self._ports[name] = [newest]
                for port in left:
                    port.close()
            case "close":
                for port in self._ports.pop(name):
                    port.close()
                del self._rotations[name]
            case _:
                raise AssertionError(f"unknown message {word!r}")


def serve(channel: socket.socket, *, udp_idle_s: float, seed: int) -> None:
    """Carry traffic until kube-proxy closes the channel."""
    from testbed.programs.userspace_tcp import Pipes, TcpPort
    from testbed.programs.userspace_udp import UdpClients, UdpPort

    def notify(notice: Notice) -> None:
        with contextlib.suppress(BlockingIOError):  # a notice that kube-proxy has no time for is lost
            channel.send(json.dumps(notice).encode(), socket.MSG_DONTWAIT)

    loop = Loop(notify)
    with contextlib.suppress(OSError):  # the one before this has not ended yet: then nobody can ask
        loop.show_pairs(PairTable())
    pipes, clients = Pipes(loop), UdpClients(loop, udp_idle_s)

    def make_port(name: ServicePortName, listener: socket.socket, rotation: Rotation) -> Copies:
        if listener.type == socket.SOCK_DGRAM:
            return UdpPort(loop, clients, str(name), listener, rotation)
        return TcpPort(loop, pipes, str(name), listener, rotation)

    control = Control(loop, channel, make_port, seed)
    notify(Notice("", "ready", str(os.getpid())))
    while not control.has_ended:
        loop.turn()
