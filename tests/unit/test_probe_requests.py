"""Real requests over loopback sockets: what a server does, and what the observation says of it."""

# ruff: noqa: E501  # whole answers, in tables

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from testbed.model.scenario import Request, Scheme
from testbed.probes import Observation, Outcome, ask, requests

PATIENCE_S = 20.0  # where an answer comes: longer than any pause of a busy machine
IMPATIENT_S = 0.2  # where none comes
Serve = Callable[[socket.socket], None]
ECHO = {"namespace": "dev", "pod": "web-1", "client": {"address": "10.244.1.9", "port": 40000}}


class Server:
    """A TCP server on loopback: each connection is handed to ``serve`` and closed after it."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.accepted = 0
        self.ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                if self.ending.is_set():
                    return
                self.accepted += 1
                connection.settimeout(PATIENCE_S)
                with contextlib.suppress(OSError):
                    self._serve(connection)

    def stop(self) -> None:
        self.ending.set()
        with socket.create_connection(("127.0.0.1", self.port)):
            pass
        self._thread.join(PATIENCE_S)
        self._listener.close()
        assert not self._thread.is_alive()


@pytest.fixture
def start() -> Iterator[Callable[[Serve], Server]]:
    """Start servers; they end with the test."""
    running: list[Server] = []

    def start_one(serve: Serve) -> Server:
        running.append(Server(serve))
        return running[-1]

    yield start_one
    for server in running:
        server.stop()


def read_head(connection: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received and (part := connection.recv(65536)):
        received += part
    return received


def says(answer: bytes, *, pieces: int = 1) -> Serve:
    """Answer a request's head with these bytes, then close."""

    def serve(connection: socket.socket) -> None:
        read_head(connection)
        size = -(-len(answer) // pieces) or 1
        for start in range(0, len(answer), size):
            connection.sendall(answer[start : start + size])

    return serve


def request(port: int, scheme: Scheme = Scheme.HTTP, **fields: Any) -> Request:
    given = {"host": "127.0.0.1", "path": "/", "patience_s": PATIENCE_S, **fields}
    return Request(scheme=scheme, port=port, **given)


def ask_one(question: Request, *, connect_only: bool = False) -> Observation:
    (seen,) = ask(question, 1, connect_only)
    return seen


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────────────

LARGE = b"x" * 200_000


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", 200, "hello", id="content-length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello and more", 200, "hello", id="no more than its length"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", 204, "", id="no content"),
        pytest.param(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", 304, "", id="a status without a body"),
        pytest.param(b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", 200, "ok", id="no phrase"),
        pytest.param(b"HTTP/1.0 200 OK\r\n\r\nuntil close", 200, "until close", id="until close"),
        pytest.param(b"HTTP/1.1 503 No\r\ncontent-LENGTH:  2 \r\n\r\nno", 503, "no", id="names in any case, blanks"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, "ok", id="after a 100"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;ext=1\r\nlo\r\n0\r\n\r\n", 200, "hello", id="chunked"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\nContent-Length: 99\r\n\r\nA\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n", 200, "0123456789",
                     id="chunked counts before content-length (RFC 9112, 6.3)"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe", 200, "\ufffd\ufffd", id="not UTF-8"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + LARGE, 200, "x" * 65536, id="64 KiB of a long one"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\n" + LARGE, 200, "x" * 65536, id="64 KiB until close"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n30d40\r\n" + LARGE + b"\r\n0\r\n\r\n", 200, "x" * 65536, id="64 KiB of a chunk"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pieces", [1, 7])
def test_http_answers(start: Callable[[Serve], Server], answer: bytes, status: int, body: str, pieces: int) -> None:
    """Every way an answer's end is told, in one piece and in several."""
    seen = ask_one(request(start(says(answer, pieces=pieces)).port))
    assert (seen.outcome, seen.detail) == (Outcome.ANSWERED, "")
    assert (seen.status, seen.body, seen.answered_by) == (status, body, "")
    assert seen.duration_ms > 0


@pytest.mark.parametrize(
    ("answer", "outcome", "detail"),
    [
        pytest.param(b"", Outcome.RESET, "closed without an answer", id="nothing"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", Outcome.RESET, "closed after 5 of 10 bytes", id="a part of the body"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", Outcome.RESET, "closed in the middle of its answer", id="a part of a chunk"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n", Outcome.RESET, "closed in the middle of its answer", id="no last chunk"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", Outcome.RESET, "closed in the middle of its answer", id="no chunk size"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", Outcome.FAILED, "not an HTTP answer: 'SSH-2.0-OpenSSH_9.2'", id="another protocol"),
        pytest.param(b"HTTP/1.1 abc OK\r\n\r\n", Outcome.FAILED, "not an HTTP answer: 'HTTP/1.1 abc OK'", id="no status"),
        pytest.param(b"y" * 70_000, Outcome.FAILED, "not an HTTP answer: 'got more than 65536 bytes when reading status line'", id="an endless line"),
    ],
)  # fmt: skip
def test_http_answers_that_are_none(
    start: Callable[[Serve], Server], answer: bytes, outcome: Outcome, detail: str
) -> None:
    """A broken answer is never taken for a whole one."""
    seen = ask_one(request(start(says(answer)).port))
    assert (seen.outcome, seen.detail) == (outcome, detail)
    assert (seen.status, seen.body, seen.answered_by) == (0, "", "")


def http(body: bytes, *headers: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


@pytest.mark.parametrize(
    ("body", "headers", "answered_by", "client"),
    [
        pytest.param(json.dumps(ECHO).encode(), [], "dev/web-1", "10.244.1.9", id="the echo server's JSON"),
        pytest.param(b"a page", ["X-Served-By: dev/nginx-1"], "dev/nginx-1", "", id="nginx by its header"),
        pytest.param(json.dumps(ECHO).encode(), ["x-served-by: dev/proxy"], "dev/proxy", "10.244.1.9", id="the header counts before the body"),
        pytest.param(b'{"namespace": "dev", "pod": "web-1"}', [], "dev/web-1", "", id="JSON that knows no client"),
        pytest.param(b'{"pod": "web-1"}', [], "", "", id="JSON that knows no namespace"),
        pytest.param(b"5", [], "", "", id="a number"),
        pytest.param(b"[]", [], "", "", id="a list"),
        pytest.param(b"[" * 60_000, [], "", "", id="JSON too deep for the parser"),
    ],
)  # fmt: skip
def test_who_answered(
    start: Callable[[Serve], Server], body: bytes, headers: list[str], answered_by: str, client: str
) -> None:
    """The pod and the client's address as the server tells them; nothing where it does not."""
    seen = ask_one(request(start(says(http(body, *headers))).port))
    assert (seen.outcome, seen.answered_by, seen.seen_client) == (Outcome.ANSWERED, answered_by, client)


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({}, "GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: testbed\r\nAccept: */*\r\nConnection: close\r\n\r\n"),
        ({"path": "/a?b=c"}, "GET /a?b=c HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: testbed\r\nAccept: */*\r\nConnection: close\r\n\r\n"),
        ({"headers": (("host", "web.example"), ("X-A", "1"), ("X-A", "2"))},
         "GET / HTTP/1.1\r\nUser-Agent: testbed\r\nAccept: */*\r\nConnection: close\r\nhost: web.example\r\nX-A: 1\r\nX-A: 2\r\n\r\n"),
        ({"send": "grüß"},
         "POST / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: testbed\r\nAccept: */*\r\nConnection: close\r\nContent-Length: 6\r\n\r\ngrüß"),
        ({"send": ""},
         "POST / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: testbed\r\nAccept: */*\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"),
    ],
)  # fmt: skip
def test_what_is_sent(start: Callable[[Serve], Server], fields: dict[str, Any], sent: str) -> None:
    """Whole requests; a scenario's headers replace ours."""
    received: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        head = read_head(connection)
        missing = 6 - len(head.partition(b"\r\n\r\n")[2]) if b"Content-Length: 6" in head else 0
        received.append(head + (connection.recv(missing) if missing else b""))
        connection.sendall(http(b""))

    server = start(serve)
    assert ask_one(request(server.port, **fields)).outcome is Outcome.ANSWERED
    assert received == [sent.replace("{port}", str(server.port)).encode()]


@pytest.mark.parametrize(
    ("scheme", "port", "host"),
    [(Scheme.HTTP, 80, "web"), (Scheme.HTTP, 443, "web:443"), (Scheme.HTTPS, 443, "web"), (Scheme.HTTPS, 80, "web:80")],
)
def test_the_host_header_leaves_out_the_scheme_s_own_port(scheme: Scheme, port: int, host: str) -> None:
    """As browsers and curl do."""
    asked = Request(scheme=scheme, host="web", port=port, path="/")
    assert f"\r\nHost: {host}\r\n".encode() in requests._http_request(asked)


def test_each_request_is_a_connection(start: Callable[[Serve], Server]) -> None:
    """Else only the first would be a decision of the proxy's rules."""
    server = start(says(http(b"x")))
    seen = ask(request(server.port), 5)
    assert [one.outcome for one in seen] == [Outcome.ANSWERED] * 5
    assert server.accepted == 5


def test_an_answer_ends_where_it_says(start: Callable[[Serve], Server]) -> None:
    """A server that keeps the connection open costs no patience."""

    def serve(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
        connection.recv(1)  # until the client closes

    seen = ask_one(request(start(serve).port, headers=(("Connection", "keep-alive"),)))
    assert (seen.outcome, seen.body) == (Outcome.ANSWERED, "ok")


def test_patience_is_for_the_whole_answer(start: Callable[[Serve], Server]) -> None:
    """A server that sends a byte now and then does not stretch it."""
    server: Server

    def serve(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not server.ending.wait(IMPATIENT_S / 4):
            connection.sendall(b"x")

    server = start(serve)
    seen = ask_one(request(server.port, patience_s=IMPATIENT_S))
    assert (seen.outcome, seen.detail) == (Outcome.TIMED_OUT, "no answer within 0.2 s")
    assert seen.duration_ms >= 200


def test_a_reset_in_the_middle(start: Callable[[Serve], Server]) -> None:
    """The connection was there and broke."""

    def serve(connection: socket.socket) -> None:
        read_head(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close sends RST

    seen = ask_one(request(start(serve).port))
    assert (seen.outcome, seen.detail) == (Outcome.RESET, "Connection reset by peer")


CERTIFICATE = Path(__file__).parent / "files" / "self-signed.pem"


def test_https(start: Callable[[Serve], Server]) -> None:
    """Any certificate will do: what is tested is the way there."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection.dup(), server_side=True) as secured:
            says(http(json.dumps(ECHO).encode()))(secured)

    seen = ask_one(request(start(serve).port, Scheme.HTTPS))
    assert (seen.outcome, seen.status, seen.answered_by) == (Outcome.ANSWERED, 200, "dev/web-1")


def test_https_to_a_server_without_it(start: Callable[[Serve], Server]) -> None:
    """The TLS library's words; its error numbers are its own and must not be read as the kernel's."""
    plain = start(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    seen = ask_one(request(plain.port, Scheme.HTTPS))
    assert seen.outcome is Outcome.FAILED
    assert "wrong version number" in seen.detail.lower()
    closing = start(lambda connection: connection.recv(65536) and None)
    assert ask_one(request(closing.port, Scheme.HTTPS)).outcome is Outcome.RESET


def test_https_patience(start: Callable[[Serve], Server]) -> None:
    """A handshake that nobody answers is a time-out as well."""
    server = start(lambda connection: connection.recv(65536) and connection.recv(1) and None)
    seen = ask_one(request(server.port, Scheme.HTTPS, patience_s=IMPATIENT_S))
    assert (seen.outcome, seen.detail) == (Outcome.TIMED_OUT, "no answer within 0.2 s")


# ── TCP ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def line_server(answer: Callable[[bytes], bytes], *, stays: bool = False) -> Serve:
    def serve(connection: socket.socket) -> None:
        connection.sendall(answer(connection.recv(65536)))
        if stays:
            connection.recv(1)  # until the client closes

    return serve


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        pytest.param(lambda asked: asked, "hello\n", id="what was sent"),
        pytest.param(lambda _: b"no end of line", "no end of line", id="until close"),
        pytest.param(lambda _: LARGE, "x" * 65536, id="64 KiB of a long one"),
    ],
)
def test_tcp_answers(start: Callable[[Serve], Server], answer: Callable[[bytes], bytes], body: str) -> None:
    """A line, or all there is."""
    seen = ask_one(request(start(line_server(answer)).port, Scheme.TCP))
    assert (seen.outcome, seen.body, seen.status) == (Outcome.ANSWERED, body, 0)


def test_tcp_sends_what_is_asked_for(start: Callable[[Serve], Server]) -> None:
    """And takes the first line for the answer, without waiting for an end."""
    server = start(line_server(lambda asked: b"got " + asked + b"\n", stays=True))
    assert ask_one(request(server.port, Scheme.TCP, send="PING")).body == "got PING\n"


def test_tcp_answers_without_a_line(start: Callable[[Serve], Server]) -> None:
    """Not every protocol ends an answer with a line's end: what came within the patience is the answer."""
    server = start(line_server(lambda _: b"+PONG", stays=True))
    seen = ask_one(request(server.port, Scheme.TCP, patience_s=2.0))  # all of it is used up
    assert (seen.outcome, seen.body) == (Outcome.ANSWERED, "+PONG")


def test_tcp_echo_server(start: Callable[[Serve], Server]) -> None:
    """The echo server's line of JSON."""
    seen = ask_one(request(start(line_server(lambda _: json.dumps(ECHO).encode() + b"\n")).port, Scheme.TCP))
    assert (seen.answered_by, seen.seen_client) == ("dev/web-1", "10.244.1.9")


def test_tcp_without_an_answer(start: Callable[[Serve], Server]) -> None:
    """Closed is told from silent."""
    closing = start(line_server(lambda _: b""))
    seen = ask_one(request(closing.port, Scheme.TCP))
    assert (seen.outcome, seen.detail) == (Outcome.RESET, "closed without an answer")
    silent = start(line_server(lambda _: b"", stays=True))
    seen = ask_one(request(silent.port, Scheme.TCP, patience_s=IMPATIENT_S))
    assert (seen.outcome, seen.detail) == (Outcome.TIMED_OUT, "no answer within 0.2 s")


def test_a_connection_is_enough_where_nothing_more_is_wanted(start: Callable[[Serve], Server]) -> None:
    """Nothing is sent, and a server that says nothing has answered."""
    received: SimpleQueue[bytes] = SimpleQueue()
    server = start(lambda connection: received.put(connection.recv(65536)))
    seen = ask_one(request(server.port, Scheme.TCP), connect_only=True)
    assert (seen.outcome, seen.body) == (Outcome.ANSWERED, "")
    assert received.get(timeout=PATIENCE_S) == b""


# ── UDP ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def datagram_server(answer: bytes | None) -> Iterator[tuple[int, list[bytes]]]:
    """Answer one datagram, or be silent."""
    received: list[bytes] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.bind(("127.0.0.1", 0))
        opened.settimeout(PATIENCE_S)

        def serve() -> None:
            asked, peer = opened.recvfrom(65536)
            received.append(asked)
            if answer is not None:
                opened.sendto(answer, peer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield opened.getsockname()[1], received
        thread.join()


@pytest.mark.parametrize(("send", "sent"), [(None, b"hello\n"), ("ping", b"ping"), ("", b"")])
def test_udp(send: str | None, sent: bytes) -> None:
    """One datagram there, one back."""
    with datagram_server(json.dumps(ECHO).encode()) as (port, received):
        seen = ask_one(request(port, Scheme.UDP, send=send))
    assert (seen.outcome, seen.answered_by, seen.seen_client) == (Outcome.ANSWERED, "dev/web-1", "10.244.1.9")
    assert received == [sent]


def test_udp_an_empty_answer_is_one() -> None:
    """A datagram may be empty."""
    with datagram_server(b"") as (port, _):
        assert ask_one(request(port, Scheme.UDP)).outcome is Outcome.ANSWERED


def test_udp_silence() -> None:
    """Patience ends it."""
    with datagram_server(None) as (port, _):
        seen = ask_one(request(port, Scheme.UDP, patience_s=IMPATIENT_S))
    assert (seen.outcome, seen.detail) == (Outcome.TIMED_OUT, "no answer within 0.2 s")


# ── no answer ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scheme", [Scheme.HTTP, Scheme.HTTPS, Scheme.TCP, Scheme.UDP])
def test_refused(scheme: Scheme) -> None:
    """Nobody listens: TCP is reset, UDP is told by ICMP."""
    kind = socket.SOCK_DGRAM if scheme is Scheme.UDP else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    seen = ask_one(request(port, scheme))
    assert (seen.outcome, seen.detail) == (Outcome.REFUSED, "Connection refused")


@pytest.mark.parametrize("host", ["a..b", "x" * 64, "nobody.invalid"])
def test_names_that_are_not_found(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that no resolver would be asked for, and those it does not know; the name is in the words."""
    if host.endswith(".invalid"):  # no packet may leave this machine

        def unknown(*_: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    seen = ask_one(request(80, host=host))
    assert seen.outcome is Outcome.NAME_NOT_FOUND
    assert seen.detail.startswith(f"{host}: ")


def test_a_name_that_is_found(start: Callable[[Serve], Server]) -> None:
    """/etc/hosts counts, as in a pod."""
    assert ask_one(request(start(says(http(b"x"))).port, host="localhost")).outcome is Outcome.ANSWERED


@pytest.mark.parametrize(
    ("number", "outcome", "detail"),
    [
        (errno.EHOSTUNREACH, Outcome.UNREACHABLE, "No route to host"),
        (errno.ENETUNREACH, Outcome.UNREACHABLE, "Network is unreachable"),
        (errno.ENETDOWN, Outcome.UNREACHABLE, "Network is down"),
        (errno.ECONNREFUSED, Outcome.REFUSED, "Connection refused"),
        (errno.ECONNRESET, Outcome.RESET, "Connection reset by peer"),
        (errno.EPIPE, Outcome.RESET, "Broken pipe"),
        (errno.ETIMEDOUT, Outcome.TIMED_OUT, "no answer within 20 s"),
        (errno.EPERM, Outcome.FAILED, "Operation not permitted"),
        (errno.EADDRNOTAVAIL, Outcome.FAILED, "Cannot assign requested address"),
        (errno.EACCES, Outcome.FAILED, "Permission denied"),
    ],
)
def test_the_kernel_s_errors(monkeypatch: pytest.MonkeyPatch, number: int, outcome: Outcome, detail: str) -> None:
    """What connect(2) says, in the words of reports; tests/kernel/test_probes.py makes a kernel say some of them."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "create_connection", refuse)
    seen = ask_one(request(80))
    assert (seen.outcome, seen.detail) == (outcome, detail)
