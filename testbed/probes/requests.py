"""HTTP, TCP and UDP requests, each on a connection of its own, so that each is a new decision of the proxy rules.

Meant for `Lab.call`: `ask` runs in a forked child inside the place's namespaces, with the resolver that it has there.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import json
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

from testbed.model.scenario import Request, Scheme
from testbed.probes.observation import Observation, Outcome

_MAX_BODY = 64 * 1024
_MAX_ANSWER = 1 << 20
_UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}


def ask(request: Request, times: int, connect_only: bool = False) -> tuple[Observation, ...]:
    """Send a request ``times`` times, one after another, and return what came back, in order.

    Args:
        connect_only: for TCP: a connection is an answer; nothing is sent.
    """
    return tuple(_ask_once(request, connect_only) for _ in range(times))


def _ask_once(request: Request, connect_only: bool) -> Observation:
    clock = _Clock(request.patience_s)
    fields: dict[str, Any] = {}
    try:
        address = _resolve(request)
        if request.scheme is Scheme.UDP:
            fields = _datagram(request, address, clock)
        else:
            with socket.create_connection(address, timeout=clock.left_s()) as connection:
                if request.scheme in (Scheme.HTTP, Scheme.HTTPS):
                    fields = _http(request, connection, clock)
                elif not connect_only:
                    fields = _stream(request, connection, clock)
        outcome = Outcome.ANSWERED
    except (OSError, UnicodeError) as error:
        outcome, detail = _classify(error, request)
        fields = {"detail": detail}
    return Observation(outcome=outcome, duration_ms=round(clock.spent_s() * 1000, 3), **fields)


def _classify(error: OSError | UnicodeError, request: Request) -> tuple[Outcome, str]:
    """Return how a request ended that was not answered, and why in the system's words."""
    if isinstance(error, UnicodeError):  # the idna codec: an empty label, or one over 63 characters
        return Outcome.NAME_NOT_FOUND, f"{request.host}: {error}"
    words = error.strerror or str(error)
    if isinstance(error, socket.gaierror):
        return Outcome.NAME_NOT_FOUND, f"{request.host}: {words}"
    if isinstance(error, ssl.SSLError) and not isinstance(error, TimeoutError):  # its errno is the library's own number
        was_closed = isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
        return Outcome.RESET if was_closed else Outcome.FAILED, words
    if isinstance(error, TimeoutError):
        return Outcome.TIMED_OUT, f"no answer within {request.patience_s:g} s"
    if isinstance(error, ConnectionRefusedError):
        return Outcome.REFUSED, words
    if error.errno in _UNREACHABLE:
        return Outcome.UNREACHABLE, words
    if isinstance(error, ConnectionError):
        return Outcome.RESET, words
    return Outcome.FAILED, words


class _Clock:
    """One request's patience."""

    def __init__(self, patience_s: float) -> None:
        self._began = time.monotonic()
        self._patience_s = patience_s

    def spent_s(self) -> float:
        return time.monotonic() - self._began

    def left_s(self) -> float:
        """Return the seconds that are left, more than 0; TimeoutError when there are none."""
        left = self._patience_s - self.spent_s()
        if left <= 0:
            raise TimeoutError
        return left


def _resolve(request: Request) -> tuple[str, int]:
    kind = socket.SOCK_DGRAM if request.scheme is Scheme.UDP else socket.SOCK_STREAM
    found = socket.getaddrinfo(request.host, request.port, socket.AF_INET, kind)
    address: tuple[str, int] = found[0][4]  # type: ignore[assignment]
    return address


def _text(request: Request) -> bytes:
    return (request.send if request.send is not None else "hello\n").encode()


def _datagram(request: Request, address: tuple[str, int], clock: _Clock) -> dict[str, Any]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.settimeout(clock.left_s())
        made.connect(address)  # so that an ICMP refusal is told
        with contextlib.suppress(
            PermissionError
        ):  # a rule on the way out: REJECT is told by ICMP as well, DROP is silence
            made.send(_text(request))
        return _from_echo(made.recv(_MAX_BODY))


def _stream(request: Request, connection: socket.socket, clock: _Clock) -> dict[str, Any]:
    connection.sendall(_text(request))
    data = b""
    while not data.endswith(b"\n") and len(data) < _MAX_BODY:
        try:
            connection.settimeout(clock.left_s())
            chunk = connection.recv(_MAX_BODY)
        except TimeoutError:
            if data:  # not every protocol ends its answers with a line's end
                break
            raise
        if not chunk:
            break
        data += chunk
    if not data:
        raise ConnectionResetError(errno.ECONNRESET, "closed without an answer")
    return _from_echo(data)


def _http(request: Request, connection: socket.socket, clock: _Clock) -> dict[str, Any]:
    with _secured(request, connection) as made:
        made.sendall(_http_request(request))
        response = http.client.HTTPResponse(_Incoming(made, clock), method=_method(request))  # type: ignore[arg-type]
        try:
            response.begin()
            promised = response.length  # None: chunked, or until the connection is closed
            body = response.read(_MAX_BODY)
        except http.client.RemoteDisconnected:
            raise ConnectionResetError(errno.ECONNRESET, "closed without an answer") from None
        except http.client.IncompleteRead as error:
            raise ConnectionResetError(errno.ECONNRESET, "closed in the middle of its answer") from error
        except (http.client.HTTPException, ValueError) as error:
            raise OSError(errno.EPROTO, f"not an HTTP answer: {str(error)[:60].strip()!r}") from error
        if promised is not None and len(body) < min(promised, _MAX_BODY):
            reason = f"closed after {len(body)} of {promised} bytes"
            raise ConnectionResetError(errno.ECONNRESET, reason)
        found = _from_echo(body)
        served_by = response.headers.get("X-Served-By", "")
        return {**found, "status": response.status, "answered_by": served_by or found["answered_by"]}


@contextlib.contextmanager
def _secured(request: Request, connection: socket.socket) -> Iterator[socket.socket]:
    """Give the connection itself, or TLS over it for https."""
    if request.scheme is not Scheme.HTTPS:
        yield connection
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # without the system's certificates: 35 ms of reading
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # what is tested is the way there, not the name on the certificate
    with context.wrap_socket(connection, server_hostname=request.host) as secured:
        yield secured


class _Incoming(io.RawIOBase):
    """What http.client reads from: a socket's bytes, as long as patience lasts and up to _MAX_ANSWER."""

    def __init__(self, connection: socket.socket, clock: _Clock) -> None:
        self._connection = connection
        self._clock = clock
        self._room = _MAX_ANSWER

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._room <= 0:
            return 0
        self._connection.settimeout(self._clock.left_s())
        received = self._connection.recv_into(buffer)
        self._room -= received
        return received


def _method(request: Request) -> str:
    return "GET" if request.send is None else "POST"


def _http_request(request: Request) -> bytes:
    body = (request.send or "").encode()
    is_default = request.port == (443 if request.scheme is Scheme.HTTPS else 80)
    host = request.host if is_default else f"{request.host}:{request.port}"
    headers = {"Host": host, "User-Agent": "testbed", "Accept": "*/*", "Connection": "close"}
    if request.send is not None:
        headers["Content-Length"] = str(len(body))
    given = {name.lower() for name, _ in request.headers}
    lines = [f"{_method(request)} {request.path or '/'} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items() if name.lower() not in given]
    lines += [f"{name}: {value}" for name, value in request.headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _from_echo(data: bytes) -> dict[str, Any]:
    """Return an answer's text, and what the echo server says in it of pod and client; '' for any other server."""
    body = data[:_MAX_BODY].decode(errors="replace")
    fields = {"body": body, "answered_by": "", "seen_client": ""}
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        said = json.loads(body)
        fields["answered_by"] = f"{said['namespace']}/{said['pod']}"
        fields["seen_client"] = str(said["client"]["address"])
    return fields
