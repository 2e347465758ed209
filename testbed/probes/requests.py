"""HTTP, TCP and UDP requests, each on a connection of its own, so that each is a new decision of the proxy rules.

Meant for `Lab.call`: `ask` runs in a forked child inside the place's namespaces, with the resolver that it has there.
"""

from __future__ import annotations

import errno
import json
import socket
import ssl
import time
from typing import Any

from testbed.model.scenario import Request, Scheme
from testbed.probes.observation import Observation, Outcome

_MAX_BODY = 64 * 1024
_MAX_ANSWER = 1 << 20
_UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}


def ask(request: Request, times: int) -> tuple[Observation, ...]:
    """Send a request ``times`` times, one after another, and return what came back, in order."""
    return tuple(_ask_once(request) for _ in range(times))


def _ask_once(request: Request) -> Observation:
    started = time.monotonic()
    fields: dict[str, Any] = {}
    try:
        address = _resolve(request)
        if request.scheme is Scheme.UDP:
            fields = _datagram(request, address, started)
        elif request.scheme is Scheme.TCP:
            fields = _stream(request, address, started)
        else:
            fields = _http(request, address, started)
        outcome = Outcome.ANSWERED
    except socket.gaierror as error:
        outcome, fields = Outcome.NAME_NOT_FOUND, {"detail": f"{request.host}: {error.strerror}"}
    except TimeoutError:
        outcome, fields = Outcome.TIMED_OUT, {"detail": f"no answer within {request.patience_s:g} s"}
    except ConnectionRefusedError as error:
        outcome, fields = Outcome.REFUSED, {"detail": error.strerror or "refused"}
    except OSError as error:
        unreachable = error.errno in _UNREACHABLE
        outcome = Outcome.UNREACHABLE if unreachable else Outcome.RESET
        fields = {"detail": error.strerror or str(error)}
    return Observation(outcome=outcome, duration_ms=round((time.monotonic() - started) * 1000, 3), **fields)


def _resolve(request: Request) -> tuple[str, int]:
    kind = socket.SOCK_DGRAM if request.scheme is Scheme.UDP else socket.SOCK_STREAM
    found = socket.getaddrinfo(request.host, request.port, socket.AF_INET, kind)
    address: tuple[str, int] = found[0][4]  # type: ignore[assignment]
    return address


def _left(request: Request, started: float) -> float:
    left = request.patience_s - (time.monotonic() - started)
    if left <= 0:
        raise TimeoutError
    return left


def _datagram(request: Request, address: tuple[str, int], started: float) -> dict[str, Any]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.settimeout(_left(request, started))
        made.connect(address)  # so that an ICMP refusal is told
        made.send((request.send if request.send is not None else "hello\n").encode())
        return _from_echo(made.recv(_MAX_BODY).decode(errors="replace"))


def _stream(request: Request, address: tuple[str, int], started: float) -> dict[str, Any]:
    with socket.create_connection(address, timeout=_left(request, started)) as made:
        text = request.send if request.send is not None else "hello\n"
        made.sendall(text.encode())
        data = b""
        while not data.endswith(b"\n") and len(data) < _MAX_BODY:
            made.settimeout(_left(request, started))
            chunk = made.recv(_MAX_BODY)
            if not chunk:
                break
            data += chunk
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "closed without an answer")
        return _from_echo(data.decode(errors="replace"))


def _http(request: Request, address: tuple[str, int], started: float) -> dict[str, Any]:
    with socket.create_connection(address, timeout=_left(request, started)) as plain:
        made = plain
        if request.scheme is Scheme.HTTPS:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE  # what is tested is the way there, not the name on the certificate
            made = context.wrap_socket(plain, server_hostname=request.host)
        made.sendall(_http_request(request))
        head, _, rest = _read_until(made, b"\r\n\r\n", b"", request, started).partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        words = lines[0].split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/") or not words[1].isdigit():
            raise OSError(errno.EPROTO, f"not an HTTP answer: {lines[0][:60]!r}")
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        body = _http_body(made, headers, rest, request, started).decode(errors="replace")
        found = _from_echo(body)
        served_by = headers.get("x-served-by", "")
        return {**found, "status": int(words[1]), "answered_by": served_by or found["answered_by"]}


def _http_request(request: Request) -> bytes:
    method = "GET" if request.send is None else "POST"
    body = (request.send or "").encode()
    port = "" if request.port in (80, 443) else f":{request.port}"
    headers = {"Host": f"{request.host}{port}", "User-Agent": "testbed", "Accept": "*/*", "Connection": "close"}
    if body:
        headers["Content-Length"] = str(len(body))
    given = {name.lower() for name, _ in request.headers}
    lines = [f"{method} {request.path or '/'} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items() if name.lower() not in given]
    lines += [f"{name}: {value}" for name, value in request.headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _http_body(
    made: socket.socket, headers: dict[str, str], rest: bytes, request: Request, started: float
) -> bytes:  # fmt: skip
    if "content-length" in headers and headers["content-length"].isdigit():
        wanted = min(int(headers["content-length"]), _MAX_BODY)
        while len(rest) < wanted:
            rest += _receive(made, request, started) or b"\0" * wanted
        return rest[:wanted]
    data = rest
    while len(data) < _MAX_ANSWER and (chunk := _receive(made, request, started)):
        data += chunk
    return _dechunked(data) if headers.get("transfer-encoding", "").lower() == "chunked" else data[:_MAX_BODY]


def _dechunked(data: bytes) -> bytes:
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size.split(b";")[0] or b"0", 16)
        if length == 0:
            break
        body += data[:length]
        data = data[length + 2 :]
    return body[:_MAX_BODY]


def _read_until(made: socket.socket, mark: bytes, data: bytes, request: Request, started: float) -> bytes:
    while mark not in data and len(data) < _MAX_ANSWER:
        chunk = _receive(made, request, started)
        if not chunk:
            raise ConnectionResetError(errno.ECONNRESET, "closed without a whole answer")
        data += chunk
    return data


def _receive(made: socket.socket, request: Request, started: float) -> bytes:
    made.settimeout(_left(request, started))
    return made.recv(_MAX_BODY)


def _from_echo(body: str) -> dict[str, Any]:
    """Return what an answer of the echo server says of pod and client; nothing for any other answer."""
    fields = {"body": body[:_MAX_BODY], "answered_by": "", "seen_client": ""}
    try:
        said = json.loads(body)
        fields["answered_by"] = f"{said['namespace']}/{said['pod']}"
        fields["seen_client"] = str(said["client"]["address"])
    except (ValueError, TypeError, KeyError):
        pass
    return fields
