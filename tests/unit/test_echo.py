"""The echo server over loopback sockets: HTTP, raw TCP, UDP, limits, and how it ends."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from testbed.programs import echo
from testbed.programs.echo import EchoServer

IDENTITY = {"pod": "web-1", "namespace": "dev", "node": "node1", "podIP": "10.244.1.5"}
TIMEOUT_S = 10.0


class Running:
    """An echo server in a thread."""

    def __init__(self, **options: Any) -> None:
        self.server = EchoServer(
            [("TCP", 0), ("UDP", 0)], options.pop("identity", IDENTITY), host="127.0.0.1", **options
        )
        self.tcp, self.udp = (port for _, port in self.server.bound)
        self._stop, stopping = socket.socketpair()
        self._stopping = stopping
        self.thread = threading.Thread(target=self.server.run, args=(stopping.fileno(),), kwargs={"drain_s": 5.0})
        self.thread.start()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._stop.send(b"x")
        self.thread.join(TIMEOUT_S)
        self._stop.close()
        self._stopping.close()
        assert not self.thread.is_alive()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.tcp), timeout=TIMEOUT_S)

    def ask(self, request: bytes) -> bytes:
        """Send something on a new connection, and return all that comes until the server closes it."""
        with self.connect() as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def split(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body


@pytest.fixture
def running() -> Iterator[Running]:
    """A server with an identity."""
    server = Running()
    yield server
    server.stop()


def get(path: str, *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: web", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def test_an_http_answer_says_who_was_asked_by_whom(running: Running) -> None:
    """The JSON has the pod, the client's real address and port, and the request."""
    with running.connect() as connection:
        client = connection.getsockname()
        connection.sendall(get("/a?b=c", "X-Forwarded-For: 1.2.3.4", "Connection: close", method="POST", body=b"hello"))
        status, headers, body = split(read_all(connection))
    assert (status, headers["X-Served-By"], headers["Content-Length"]) == (200, "dev/web-1", str(len(body)))
    assert json.loads(body) == {
        **IDENTITY,
        "protocol": "HTTP/1.1",
        "client": {"address": client[0], "port": client[1]},
        "serverPort": running.tcp,
        "method": "POST",
        "path": "/a?b=c",
        "headers": {"Host": "web", "X-Forwarded-For": "1.2.3.4", "Connection": "close", "Content-Length": "5"},
        "body": "hello",
    }


def test_a_connection_serves_many_requests_in_order(running: Running) -> None:
    """Pipelined requests are answered in order, also when the first takes longer, or an empty line follows it."""
    answer = b""
    with running.connect() as connection:
        connection.sendall(get("/delay/0.1") + b"\r\n" + get("/healthz") + get("/c", "Connection: close"))
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.index(b"/delay/0.1") < answer.index(b"\r\n\r\nok\n") < answer.index(b'"/c"')


@pytest.mark.parametrize(
    ("request_", "status", "body"),
    [
        pytest.param(get("/healthz"), 200, b"ok\n", id="health"),
        pytest.param(get("/hostname"), 200, b"web-1\n", id="hostname"),
        pytest.param(get("/status/503"), 503, None, id="a status"),
        pytest.param(get("/status/204"), 204, b"", id="a status without content"),
        pytest.param(get("/status/999"), 200, None, id="no such status"),
        pytest.param(get("/x", method="HEAD"), 200, b"", id="HEAD"),
        pytest.param(b"GET /x HTTP/1.0\r\n\r\n", 200, None, id="HTTP/1.0"),
        pytest.param(b"GET  /x HTTP/1.1\r\n\r\n", 400, None, id="malformed request line"),
        pytest.param(get("/x", "Bad Header : 1"), 400, None, id="malformed header"),
        pytest.param(get("/x", "Content-Length: -1"), 400, None, id="malformed length"),
        pytest.param(get("/x", "Transfer-Encoding: chunked"), 411, None, id="chunked"),
        pytest.param(get("/x", "Content-Length: 1048577"), 413, None, id="body too long"),
        pytest.param(get("/x", "A: " + "a" * echo.MAX_HEAD_BYTES), 431, None, id="head too long"),
    ],
)
def test_requests_and_their_status(running: Running, request_: bytes, status: int, body: bytes | None) -> None:
    """Each kind of request gets its status; bad ones are refused, not ignored."""
    seen, _, seen_body = split(running.ask(request_))
    assert seen == status
    if body is not None:
        assert seen_body == body


def test_a_head_answer_has_the_length_of_get(running: Running) -> None:
    """HEAD says how long the body would be and sends none of it."""
    _, headers, body = split(running.ask(get("/x", method="HEAD")))
    assert int(headers["Content-Length"]) > 0
    assert body == b""


def test_a_large_body_comes_back(running: Running) -> None:
    """A body up to the limit arrives in many pieces and is answered whole, after 100-continue."""
    body = b"x" * echo.MAX_BODY_BYTES
    answer = running.ask(get("/", "Expect: 100-continue", method="PUT", body=body))
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")
    assert json.loads(split(answer.partition(b"\r\n\r\n")[2])[2])["body"] == body.decode()


def test_raw_tcp_lines_are_answered_line_by_line(running: Running) -> None:
    """What does not look like HTTP is lines; the last one needs no end."""
    lines = running.ask(b"hello\r\nGET lost\nlast").splitlines()
    assert [json.loads(line)["body"] for line in lines] == ["hello", "GET lost", "last"]
    assert json.loads(lines[0])["protocol"] == "TCP"
    assert "method" not in json.loads(lines[0])


def test_a_line_without_end_is_cut_off(running: Running) -> None:
    """A client cannot make the server hold ever more."""
    with running.connect() as connection:
        with contextlib.suppress(OSError):
            for _ in range(64):
                connection.sendall(b"x" * 65536)
        with contextlib.suppress(ConnectionResetError):
            assert read_all(connection) == b""


def test_a_datagram_is_answered_from_the_address_asked(running: Running) -> None:
    """UDP answers come from the address that was asked, and hold the datagram's text."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(TIMEOUT_S)
        asking.sendto(b"ping \xff", ("127.0.0.1", running.udp))
        answer, source = asking.recvfrom(65536)
        assert source == ("127.0.0.1", running.udp)
        shown = json.loads(answer)
        assert (shown["protocol"], shown["body"], shown["pod"]) == ("UDP", "ping �", "web-1")
        assert shown["client"] == {"address": "127.0.0.1", "port": asking.getsockname()[1]}


def test_a_wildcard_server_answers_from_the_address_asked() -> None:
    """Also when it listens on all addresses, a node's second address answers for itself."""
    with EchoServerOn("0.0.0.0") as port, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(TIMEOUT_S)
        asking.sendto(b"x", ("127.0.0.2", port))
        assert asking.recvfrom(65536)[1] == ("127.0.0.2", port)


@contextlib.contextmanager
def EchoServerOn(host: str) -> Iterator[int]:
    server = EchoServer([("UDP", 0)], IDENTITY, host=host)
    stop, stopping = socket.socketpair()
    thread = threading.Thread(target=server.run, args=(stopping.fileno(),))
    thread.start()
    yield server.bound[0][1]
    stop.send(b"x")
    thread.join(TIMEOUT_S)
    stop.close()
    stopping.close()


def test_a_stand_in_says_so() -> None:
    """Answers of a stand-in name the image it stands in for."""
    running = Running(identity={**IDENTITY, "standInFor": "example.com/cart:v3"})
    try:
        assert json.loads(split(running.ask(get("/")))[2])["standInFor"] == "example.com/cart:v3"
    finally:
        running.stop()


def test_http_echo_text() -> None:
    """With a text, that text is the answer."""
    running = Running(text="hello")
    try:
        assert split(running.ask(get("/")))[2] == b"hello\n"
    finally:
        running.stop()


def test_too_many_connections_wait(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit a new client waits until another leaves, and is then served."""
    monkeypatch.setattr(echo, "MAX_CONNECTIONS", 2)
    with running.connect() as first, running.connect() as second, running.connect() as third:
        for connection in (first, second):
            connection.sendall(b"x\n")
            assert connection.recv(65536)
        third.sendall(b"third\n")
        third.settimeout(0.2)
        with pytest.raises(TimeoutError):
            third.recv(65536)
        first.close()
        third.settimeout(TIMEOUT_S)
        assert b"third" in third.recv(65536)


# --- as a process ----------------------------------------------------------------------------------------------------

_PROGRAM = """
import sys
from testbed.programs.builtins import run_builtin
sys.exit(run_builtin("echo", {"ports": [["TCP", int(sys.argv[1])], ["SCTP", 9]], "identity": {"pod": "p"}}))
"""


@contextlib.contextmanager
def process(port: int = 0) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(port)], stderr=subprocess.PIPE, text=True)
    with child:
        try:
            yield child
        finally:
            child.kill()


def serving_port(child: subprocess.Popen[str]) -> int:
    """Return the port from the line that says what is served."""
    assert child.stderr is not None
    while line := child.stderr.readline():
        found = re.search(r"serving TCP (\d+)", line)
        if found:
            return int(found[1])
    raise AssertionError("it never served")


def test_sigterm_drains(eventually: Callable[..., object]) -> None:
    """After SIGTERM nobody new is let in, idle connections end, what was asked for is answered, and it exits with 0."""
    with process() as child:
        address = ("127.0.0.1", serving_port(child))
        with (
            socket.create_connection(address, timeout=TIMEOUT_S) as busy,
            socket.create_connection(address, timeout=TIMEOUT_S) as idle,
        ):
            idle.sendall(get("/healthz"))
            assert idle.recv(65536).endswith(b"ok\n")
            busy.sendall(get("/delay/0.7"))
            time.sleep(0.1)  # until the request has been read; there is nothing to observe
            child.send_signal(signal.SIGTERM)
            assert read_all(idle) == b""

            def is_refused() -> bool:
                try:
                    socket.create_connection(address, timeout=TIMEOUT_S).close()
                except ConnectionRefusedError:
                    return True
                return False

            eventually(is_refused)
            assert b"200 OK" in read_all(busy)
        assert child.wait(TIMEOUT_S) == 0


def test_a_port_in_use_ends_it() -> None:
    """It says which port it could not have, and exits with 1."""
    with socket.create_server(("0.0.0.0", 0)) as holder, process(holder.getsockname()[1]) as child:
        assert child.stderr is not None
        words = child.stderr.read()
        assert child.wait(TIMEOUT_S) == 1
        assert f"TCP port {holder.getsockname()[1]}: Address already in use" in words


def test_sctp_is_noted() -> None:
    """A protocol that it does not speak is mentioned, and the others are served."""
    with process() as child:
        assert child.stderr is not None
        assert "SCTP is not served" in child.stderr.readline()
        assert serving_port(child)
