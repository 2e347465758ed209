"""The echo server: answers HTTP, raw TCP and UDP with JSON that says which pod was reached, by whom and how.

::

    GET /any/path      200 and the JSON below            /healthz        200 "ok"
    /status/503        that status and the JSON          /delay/0.5      the JSON, half a second later
    /hostname          the pod's name as text            X-Served-By     NAMESPACE/POD, in every answer
    a TCP line         one line of JSON                  a UDP datagram  one datagram of JSON

    {"pod", "namespace", "node", "podIP", "protocol", "client": {"address", "port"}, "serverPort", "body",
     "method", "path", "headers" (HTTP only), "standInFor" (only when it runs in the place of an unknown image)}

A thousand of these run at once, forked from a parent that has imported this module. So it is one small event loop
without threads, and imports nothing that the parent does not hold anyway.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

MAX_HEAD_BYTES: Final = 32 * 1024
MAX_BODY_BYTES: Final = 1024 * 1024
MAX_LINE_BYTES: Final = 64 * 1024
MAX_DELAY_S: Final = 60.0
MAX_CONNECTIONS: Final = 1000  # below the usual limit of 1,024 descriptors
DRAIN_S: Final = 25.0  # less than Kubernetes' default grace period of 30 s

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

    __slots__ = ("closing", "expects", "inbox", "is_http", "is_waiting", "outbox", "peer", "port", "request", "socket")

    def __init__(self, accepted: socket.socket, peer: tuple[str, int], port: int) -> None:
        self.socket = accepted
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
        self._selector = selectors.DefaultSelector()
        self._connections: set[_Connection] = set()
        self._timers: list[tuple[float, int, _Connection, bytes]] = []
        self._timer_count = 0
        self._listening: list[socket.socket] = []
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
        real_port = int(opened.getsockname()[1])
        self.bound.append((protocol, real_port))
        self._listening.append(opened)
        ready: Callable[[int], None] = (
            (lambda _mask: self._answer_datagrams(opened, real_port))
            if is_udp
            else (lambda _mask: self._accept(opened, real_port))
        )
        self._selector.register(opened, selectors.EVENT_READ, ready)

    def run(self, stopping: socket.socket, *, drain_s: float = DRAIN_S) -> None:
        """Serve until a byte comes from ``stopping``; then finish what is open, for at most ``drain_s``."""
        self._selector.register(stopping, selectors.EVENT_READ, None)
        deadline: float | None = None
        while deadline is None or (self._connections and time.monotonic() < deadline):
            for key, mask in self._selector.select(self._timeout(deadline)):
                if key.data is not None:
                    key.data(mask)
                else:
                    self._selector.unregister(stopping)
                    deadline = time.monotonic() + drain_s
                    self._stop_accepting()
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                _, _, connection, answer = heapq.heappop(self._timers)
                connection.is_waiting = False
                if connection in self._connections:
                    connection.outbox += answer
                    self._advance(connection)
            if deadline is not None:
                for connection in [one for one in self._connections if one.is_idle]:
                    self._close(connection)
        for connection in list(self._connections):
            self._close(connection)
        self._selector.close()

    def _timeout(self, deadline: float | None) -> float | None:
        moments = [moment for moment in (deadline, self._timers[0][0] if self._timers else None) if moment is not None]
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _stop_accepting(self) -> None:
        for opened in self._listening:
            with contextlib.suppress(KeyError):  # unregistered when there were too many connections
                self._selector.unregister(opened)
            opened.close()
        self._listening = []

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
            with contextlib.suppress(OSError):  # the network may lose it as well
                opened.sendmsg([answer], source, 0, peer)

    # -- TCP -------------------------------------------------------------------------------------------------------

    def _accept(self, opened: socket.socket, port: int) -> None:
        try:
            accepted, peer = opened.accept()
        except OSError:  # it left before it was accepted
            return
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(accepted, peer, port)
        self._connections.add(connection)
        self._selector.register(accepted, selectors.EVENT_READ, lambda mask: self._serve(connection, mask))
        if len(self._connections) >= MAX_CONNECTIONS:
            self._pause_accepting()

    def _pause_accepting(self) -> None:
        self._is_accepting = False
        for opened in self._listening:
            if opened.type == socket.SOCK_STREAM:
                self._selector.unregister(opened)

    def _resume_accepting(self) -> None:
        self._is_accepting = True
        for opened, (protocol, port) in zip(self._listening, self.bound, strict=False):
            if protocol != "UDP":
                self._selector.register(
                    opened, selectors.EVENT_READ, lambda _mask, o=opened, p=port: self._accept(o, p)
                )

    def _serve(self, connection: _Connection, mask: int) -> None:
        if mask & selectors.EVENT_READ:
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
        wanted = selectors.EVENT_WRITE if connection.outbox else 0
        if (
            not connection.closing
            and len(connection.outbox) < MAX_BODY_BYTES
            and len(connection.inbox) < 2 * MAX_BODY_BYTES
        ):
            wanted |= selectors.EVENT_READ
        self._watch(connection, wanted)

    def _watch(self, connection: _Connection, wanted: int) -> None:
        known = self._selector.get_map().get(connection.socket)
        if known is None:
            if wanted:
                self._selector.register(connection.socket, wanted, lambda mask: self._serve(connection, mask))
        elif not wanted:
            self._selector.unregister(connection.socket)
        elif known.events != wanted:
            self._selector.modify(connection.socket, wanted, known.data)

    def _close(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection.socket)
        connection.socket.close()
        if not self._is_accepting and self._listening and len(self._connections) < MAX_CONNECTIONS:
            self._resume_accepting()

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


def serve(
    ports: Sequence[tuple[str, int]], identity: Mapping[str, str], *, text: str = "", drain_s: float = DRAIN_S
) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status: 0, or 1 when a port cannot be opened."""
    stop, stopping = socket.socketpair()
    for end in (stop, stopping):
        end.setblocking(False)

    def on_signal(_number: int, _frame: object) -> None:
        with contextlib.suppress(OSError):
            stop.send(b"x")

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    wanted = [(protocol, port) for protocol, port in ports if protocol in ("TCP", "UDP")]
    for protocol, port in ports:
        if protocol not in ("TCP", "UDP"):
            _say(f"port {port}: {protocol} is not served")
    try:
        server = EchoServer(wanted, identity, text=text)
    except OSError as error:
        _say(f"cannot listen on {error.strerror}")
        return 1
    shown = ", ".join(f"{protocol} {port}" for protocol, port in server.bound) or "no port"
    _say(f"serving {shown}" + (f" in the place of {identity['standInFor']}" if identity.get("standInFor") else ""))
    server.run(stopping, drain_s=drain_s)
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"echo: {line}\n")
    sys.stderr.flush()
