"""The echo server: answers HTTP, raw TCP and UDP with JSON that says which pod was reached, by whom and how.

::

    GET /any/path      200 and the JSON below            /healthz        200 "ok"
    /status/503        that status and the JSON          /delay/0.5      the JSON, half a second later
    /hostname          the pod's name as text            X-Served-By     NAMESPACE/POD, in every answer
    a TCP line         one line of JSON                  a UDP datagram  one datagram of JSON

    {"pod", "namespace", "node", "podIP", "protocol", "client": {"address", "port"}, "serverPort", "body",
     "method", "path", "headers" (HTTP only), "standInFor" (only when it runs in the place of an unknown image)}

A thousand of these run at once, forked from a parent that has imported this module and has `rehearse`d. Each page that
a child touches is a page more, a thousand times. So a server that nobody asks only waits; whoever asks is answered by a
worker that it forks and that leaves when all is quiet. The worker is one small event loop on `select.epoll`, without the
selectors module, closures or context managers where requests pass (docs/adr/0004-forker.md).
"""

from __future__ import annotations

import heapq
import json
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Final

MAX_HEAD_BYTES: Final = 32 * 1024
MAX_BODY_BYTES: Final = 1024 * 1024
MAX_LINE_BYTES: Final = 64 * 1024
MAX_DELAY_S: Final = 60.0
MAX_CONNECTIONS: Final = 1000  # below the usual limit of 1,024 descriptors
DRAIN_S: Final = 25.0  # less than Kubernetes' default grace period of 30 s
LINGER_S: Final = 0.5  # how long a worker waits for more

_BACKLOG = 512
_IP_PKTINFO = 8  # linux/in.h; Python 3.11's socket module has no name for it
_PKTINFO = struct.Struct("=i4s4s")  # struct in_pktinfo: interface, local address, destination address
_METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"CONNECT", b"TRACE")
_PHRASES = {
    200: "OK", 201: "Created", 204: "No Content", 301: "Moved Permanently", 302: "Found", 304: "Not Modified",
    400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 411: "Length Required",
    413: "Content Too Large", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip
_IDENTITY = ("pod", "namespace", "node", "podIP", "standInFor")


_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT


class _Refused(Exception):
    """A request that cannot be answered as asked; the connection is closed after the answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Request:
    __slots__ = ("body", "headers", "keep_alive", "method", "path", "version")

    def __init__(self, method: str, path: str, version: str, headers: dict[str, str]) -> None:
        self.method = method
        self.path = path
        self.version = version
        self.headers = headers
        self.body = b""
        connection = self.field("connection").lower()
        self.keep_alive = "close" not in connection if version == "HTTP/1.1" else "keep-alive" in connection

    def field(self, name: str) -> str:
        return next((value for key, value in self.headers.items() if key.lower() == name), "")


def parse_head(head: bytes) -> _Request:
    """Return the request that a head (without its final empty line) begins, or raise _Refused."""
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise _Refused(400, "malformed request line")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise _Refused(400, "malformed header")
        value = value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return _Request(words[0], words[1], words[2], headers)


def looks_like_http(line: bytes) -> bool:
    """Say whether a connection's first line is an HTTP request line; everything else is raw TCP."""
    return line.split(b" ", 1)[0] in _METHODS and b" HTTP/1." in line


class _Connection:
    """One TCP connection: what came in, what is to go out, and what it waits for."""

    __slots__ = (
        "closing", "expects", "fd", "inbox", "is_http", "is_waiting", "outbox", "peer", "port", "request", "socket",
        "watched",
    )  # fmt: skip

    def __init__(self, accepted: socket.socket, peer: tuple[str, int], port: int) -> None:
        self.socket = accepted
        self.fd = accepted.fileno()
        self.watched = 0  # events
        self.peer = peer
        self.port = port
        self.inbox = b""
        self.outbox = b""
        self.is_http: bool | None = None  # not known before the first line
        self.request: _Request | None = None  # its head is here, its body not yet
        self.expects = 0  # bytes of that body
        self.is_waiting = False  # for a /delay/ to pass
        self.closing = False  # once everything is sent

    @property
    def is_idle(self) -> bool:
        return not (self.inbox or self.outbox or self.request or self.is_waiting)


class _Listener:
    """An open port."""

    __slots__ = ("is_udp", "port", "socket")

    def __init__(self, opened: socket.socket, port: int, is_udp: bool) -> None:
        self.socket = opened
        self.port = port
        self.is_udp = is_udp


class EchoServer:
    """Sockets on some ports and the loop that serves them.

    Args:
        ports: ``("TCP", 8080)``, ``("UDP", 53)``; TCP port 0 takes a free one (`bound` tells which).
        identity: Who answers: keys pod, namespace, node, podIP and, of a stand-in, standInFor.
        text: What HTTP requests are answered with in the place of JSON.
    """

    def __init__(
        self, ports: Sequence[tuple[str, int]], identity: Mapping[str, str], *, text: str = "", host: str = "0.0.0.0"
    ) -> None:
        self._identity = {key: identity[key] for key in _IDENTITY if identity.get(key)}
        self._served_by = f"{identity.get('namespace', '')}/{identity.get('pod', '')}"
        self._text = text
        self._epoll: select.epoll | None = None  # while it runs
        self._connections: dict[int, _Connection] = {}  # by descriptor
        self._timers: list[tuple[float, int, _Connection, bytes]] = []
        self._timer_count = 0
        self._listening: dict[int, _Listener] = {}  # by descriptor
        self._is_accepting = True
        self.bound: list[tuple[str, int]] = []
        for protocol, port in ports:
            self._open(protocol, host, port)

    def _open(self, protocol: str, host: str, port: int) -> None:
        is_udp = protocol == "UDP"
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM if is_udp else socket.SOCK_STREAM)
        try:
            if is_udp:
                opened.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            else:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind((host, port))
            if not is_udp:
                opened.listen(_BACKLOG)
        except OSError as error:
            opened.close()
            raise OSError(error.errno, f"{protocol} port {port}: {os.strerror(error.errno or 0)}") from error
        opened.setblocking(False)
        listener = _Listener(opened, int(opened.getsockname()[1]), is_udp)
        self.bound.append((protocol, listener.port))
        self._listening[opened.fileno()] = listener

    def wait(self, stopping: int) -> bool:
        """Wait until somebody asks, and return True; False when there is a byte to read from ``stopping``."""
        waiting = select.poll()
        waiting.register(stopping, select.POLLIN)
        for fd in self._listening:
            waiting.register(fd, select.POLLIN)
        return all(fd != stopping for fd, _ in waiting.poll())

    def run(self, stopping: int, *, drain_s: float = DRAIN_S, linger_s: float | None = None) -> None:
        """Serve until there is a byte to read from ``stopping``; then finish what is open, for at most ``drain_s``.

        With ``linger_s``, end also when nothing was asked for so long and nothing is open.
        """
        epoll = self._epoll = select.epoll()
        epoll.register(stopping, _READ)
        for fd in self._listening:
            epoll.register(fd, _READ)
        deadline: float | None = None
        while deadline is None or (self._connections and time.monotonic() < deadline):
            timeout_s = self._timeout(deadline)
            is_quiet = linger_s is not None and not self._connections and not self._timers
            found = epoll.poll(linger_s if is_quiet else timeout_s)
            if is_quiet and not found:
                break
            for fd, events in found:
                if fd == stopping:
                    epoll.unregister(stopping)
                    deadline = time.monotonic() + drain_s
                    self._stop_accepting()
                else:
                    self._handle(fd, events)
            if self._timers:
                self._send_delayed()
            if deadline is not None:
                for connection in [one for one in self._connections.values() if one.is_idle]:
                    self._close(connection)
        self.close()

    def close(self) -> None:
        """Give up what is open."""
        self._stop_accepting()
        for connection in list(self._connections.values()):
            self._close(connection)
        if self._epoll is not None:
            self._epoll.close()

    @property
    def _poller(self) -> select.epoll:
        assert self._epoll is not None, "only a server that runs has connections"
        return self._epoll

    def _handle(self, fd: int, events: int) -> None:
        connection = self._connections.get(fd)
        if connection is not None:
            self._serve(connection, events)
            return
        listener = self._listening.get(fd)
        if listener is None:  # closed by an earlier event of the same round
            return
        if listener.is_udp:
            self._answer_datagrams(listener.socket, listener.port)
        else:
            self._accept(listener)

    def _send_delayed(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, _, connection, answer = heapq.heappop(self._timers)
            connection.is_waiting = False
            if self._connections.get(connection.fd) is connection:
                connection.outbox += answer
                self._advance(connection)

    def _timeout(self, deadline: float | None) -> float:
        """Return the seconds until something is due, -1 for never."""
        if self._timers and (deadline is None or self._timers[0][0] < deadline):
            deadline = self._timers[0][0]
        return -1 if deadline is None else max(0.0, deadline - time.monotonic())

    def _stop_accepting(self) -> None:
        for listener in self._listening.values():
            listener.socket.close()  # which takes it out of the epoll set
        self._listening = {}

    # -- UDP -------------------------------------------------------------------------------------------------------

    def _answer_datagrams(self, opened: socket.socket, port: int) -> None:
        while True:
            try:
                body, extra, _, peer = opened.recvmsg(65535, socket.CMSG_SPACE(_PKTINFO.size))
            except OSError:  # nothing left; or an ICMP error that an earlier answer met
                return
            answer = json.dumps(self._answer(peer, port, "UDP", body)).encode()
            # From the address that was asked: a node has several, and a reply from another one is nobody's reply.
            source = [
                (level, kind, _PKTINFO.pack(0, _PKTINFO.unpack(value[: _PKTINFO.size])[1], b"\0" * 4))
                for level, kind, value in extra
                if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO)
            ]
            try:
                opened.sendmsg([answer], source, 0, peer)
            except OSError:  # the network may lose it as well
                continue

    # -- TCP -------------------------------------------------------------------------------------------------------

    def _accept(self, listener: _Listener) -> None:
        try:
            accepted, peer = listener.socket.accept()
        except OSError:  # it left before it was accepted
            return
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(accepted, peer, listener.port)
        self._connections[connection.fd] = connection
        self._watch(connection, _READ)
        if len(self._connections) >= MAX_CONNECTIONS:
            self._accept_more(False)

    def _accept_more(self, accepting: bool) -> None:
        """Pause or resume listening, so that a flood waits in the kernel's queue."""
        self._is_accepting = accepting
        for fd, listener in self._listening.items():
            if not listener.is_udp:
                self._poller.modify(fd, _READ if accepting else 0)

    def _serve(self, connection: _Connection, events: int) -> None:
        if events & ~_WRITE:  # to read, or an end (EPOLLHUP, EPOLLERR), which reading tells
            try:
                received = connection.socket.recv(65536)
            except BlockingIOError:
                received = b""
            except OSError:
                self._close(connection)
                return
            else:
                if not received:  # the peer sends no more, but may still read what it asked for
                    if connection.inbox and not connection.is_http:  # a last line without its end: `printf hi | nc`
                        connection.is_http = False
                        connection.inbox += b"\n"
                        self._take_line(connection)
                    connection.closing = True
                    if not (connection.outbox or connection.is_waiting):
                        self._close(connection)
                        return
            connection.inbox += received
        self._advance(connection)

    def _advance(self, connection: _Connection) -> None:
        """Answer what has come in completely, and send what is to go out."""
        try:
            while not connection.is_waiting and not connection.closing and self._take(connection):
                pass
        except _Refused as refusal:
            body = json.dumps({"error": str(refusal)}).encode() + b"\n"
            connection.outbox += self._render(refusal.status, body, keep_alive=False)
            connection.closing = True
            connection.inbox = b""
        if connection.outbox:
            try:
                sent = connection.socket.send(connection.outbox)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._close(connection)
                return
            connection.outbox = connection.outbox[sent:]
        if connection.closing and not connection.outbox and not connection.is_waiting:
            self._close(connection)
            return
        # A client that does not read its answers is not read from: its requests would only pile up here.
        wanted = _WRITE if connection.outbox else 0
        if (
            not connection.closing
            and len(connection.outbox) < MAX_BODY_BYTES
            and len(connection.inbox) < 2 * MAX_BODY_BYTES
        ):
            wanted |= _READ
        self._watch(connection, wanted)

    def _watch(self, connection: _Connection, wanted: int) -> None:
        if wanted == connection.watched:
            return
        if not connection.watched:
            self._poller.register(connection.fd, wanted)
        elif wanted:
            self._poller.modify(connection.fd, wanted)
        else:  # not even EPOLLHUP, which cannot be masked: a delayed answer would spin on it
            self._poller.unregister(connection.fd)
        connection.watched = wanted

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection.fd]
        connection.socket.close()
        if not self._is_accepting and len(self._connections) < MAX_CONNECTIONS:
            self._accept_more(True)

    def _take(self, connection: _Connection) -> bool:
        """Take one request or line out of the inbox and answer it; False when none is complete."""
        if connection.is_http is None:
            line, end, _ = connection.inbox.partition(b"\n")
            if not end:
                if len(line) > MAX_LINE_BYTES:
                    connection.closing = True
                return False
            connection.is_http = looks_like_http(line)
        return self._take_request(connection) if connection.is_http else self._take_line(connection)

    def _take_line(self, connection: _Connection) -> bool:
        line, end, rest = connection.inbox.partition(b"\n")
        if not end:
            connection.closing = len(line) > MAX_LINE_BYTES
            return False
        connection.inbox = rest
        answer = self._answer(connection.peer, connection.port, "TCP", line.rstrip(b"\r"))
        connection.outbox += json.dumps(answer).encode() + b"\n"
        return True

    def _take_request(self, connection: _Connection) -> bool:
        if connection.request is None:
            connection.inbox = connection.inbox.lstrip(b"\r\n")  # RFC 9112, 2.2: empty lines before a request
            head, end, rest = connection.inbox.partition(b"\r\n\r\n")
            if len(head) > MAX_HEAD_BYTES:
                raise _Refused(431, f"the head is longer than {MAX_HEAD_BYTES} bytes")
            if not end:
                return False
            request = parse_head(head)
            if request.field("transfer-encoding"):
                raise _Refused(411, "this server takes bodies with Content-Length only")
            length = request.field("content-length") or "0"
            if not (length.isascii() and length.isdigit()):
                raise _Refused(400, "malformed Content-Length")
            if int(length) > MAX_BODY_BYTES:
                raise _Refused(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
            connection.inbox, connection.request, connection.expects = rest, request, int(length)
            if request.field("expect").lower() == "100-continue":
                connection.outbox += b"HTTP/1.1 100 Continue\r\n\r\n"
        if len(connection.inbox) < connection.expects:
            return False
        request, connection.request = connection.request, None
        request.body = connection.inbox[: connection.expects]
        connection.inbox = connection.inbox[connection.expects :]
        self._answer_request(connection, request)
        return True

    def _answer_request(self, connection: _Connection, request: _Request) -> None:
        status, delay_s, text = 200, 0.0, self._text
        words = request.path.partition("?")[0].strip("/").split("/")
        match words:
            case ["healthz" | "readyz" | "livez"]:
                text = "ok"
            case ["hostname"]:
                text = self._identity.get("pod", "")
            case ["status", code] if code.isascii() and code.isdigit() and 200 <= int(code) <= 599:
                status = int(code)
            case ["delay", seconds] if seconds.replace(".", "", 1).isdigit() and seconds.isascii():
                delay_s = min(float(seconds), MAX_DELAY_S)
        if text:
            body = text.encode() + b"\n"
        else:
            answer = self._answer(connection.peer, connection.port, request.version, request.body)
            answer.update(method=request.method, path=request.path, headers=request.headers)
            body = json.dumps(answer).encode() + b"\n"
        rendered = self._render(
            status, body, keep_alive=request.keep_alive, is_text=bool(text), with_body=request.method != "HEAD"
        )
        if not request.keep_alive:
            connection.closing = True
        if delay_s:
            connection.is_waiting = True
            self._timer_count += 1
            heapq.heappush(self._timers, (time.monotonic() + delay_s, self._timer_count, connection, rendered))
        else:
            connection.outbox += rendered

    def _render(
        self, status: int, body: bytes, *, keep_alive: bool, is_text: bool = False, with_body: bool = True
    ) -> bytes:
        kind = "text/plain; charset=utf-8" if is_text else "application/json"
        lines = [f"HTTP/1.1 {status} {_PHRASES.get(status, 'Status')}", f"X-Served-By: {self._served_by}"]
        if status in (204, 304):  # RFC 9110, 6.4.1: these have no content
            with_body = False
        else:
            lines += [f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
        lines.append(f"Connection: {'keep-alive' if keep_alive else 'close'}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (body if with_body else b"")

    def _answer(self, peer: tuple[str, int], port: int, protocol: str, body: bytes) -> dict[str, object]:
        return {
            **self._identity,
            "protocol": protocol,
            "client": {"address": peer[0], "port": peer[1]},
            "serverPort": port,
            "body": body.decode("utf-8", "replace"),
        }


_stop_writers: list[int] = []
"""The writing ends of the pipes that end `serve`; there is one while it runs."""

_signals_taken = False


def _on_signal(_number: int, _frame: object) -> None:
    for writer in _stop_writers:
        try:
            os.write(writer, b"x")
        except OSError:  # full: it has been told
            continue


def take_signals() -> None:
    """Have SIGTERM and SIGINT end `serve`. A forked server inherits that from its parent."""
    global _signals_taken
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    _signals_taken = True


def rehearse() -> None:
    """Serve a request over a pair of sockets, many times, in the parent of servers to come.

    The interpreter adapts code that runs, and libraries fill caches: what is written now is shared by every child.
    """
    take_signals()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    asking, answering = socket.socketpair()
    answering.setblocking(False)
    server = EchoServer([], {"pod": "rehearsal", "namespace": "none"})
    server._epoll = select.epoll()
    connection = _Connection(answering, ("127.0.0.1", 1), 80)
    server._connections[connection.fd] = connection
    server._watch(connection, _READ)
    for _ in range(20):  # an adapting interpreter wants to see code more than once
        asking.sendall(b"GET /a HTTP/1.1\r\nHost: here\r\n\r\n")
        for fd, events in server._epoll.poll(1):
            server._handle(fd, events)
        asking.recv(4096)
    server.close()
    asking.close()


def serve(
    ports: Sequence[tuple[str, int]], identity: Mapping[str, str], *, text: str = "", drain_s: float = DRAIN_S
) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status: 0, or 1 when a port cannot be opened."""
    stopping, writer = os.pipe()
    os.set_blocking(writer, False)
    _stop_writers.append(writer)
    if not _signals_taken:
        take_signals()
    wanted = [(protocol, port) for protocol, port in ports if protocol in ("TCP", "UDP")]
    for protocol, port in ports:
        if protocol not in ("TCP", "UDP"):
            _say(f"port {port}: {protocol} is not served")
    try:
        server = EchoServer(wanted, identity, text=text)
    except OSError as error:
        _say(f"cannot listen on {error.strerror}")
        return 1
    shown = ", ".join([f"{protocol} {port}" for protocol, port in server.bound]) or "no port"
    _say(f"serving {shown}" + (f" in the place of {identity['standInFor']}" if identity.get("standInFor") else ""))
    while server.wait(stopping):
        _answer_in_worker(server, stopping, drain_s)
    return 0


def _answer_in_worker(server: EchoServer, stopping: int, drain_s: float) -> None:
    """Have a forked process answer those who ask, until all is quiet. Meanwhile nothing is done here."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            server.run(stopping, drain_s=drain_s, linger_s=LINGER_S)
            status = 0
        except Exception as error:
            _say(f"a worker failed: {type(error).__name__}: {error}")
        finally:
            os._exit(status)
    try:
        worker = os.pidfd_open(pid)
    except ProcessLookupError:  # SIGCHLD is ignored: it is gone when it has ended
        return
    ended = select.poll()
    ended.register(worker, select.POLLIN)
    ended.poll()
    os.close(worker)


def _say(line: str) -> None:
    os.write(2, f"echo: {line}\n".encode())
