"""A very small HTTP server for health and metrics: one function from path to answer, a thread per listener.

Agents run once per node, in processes that must stay small, so this uses sockets only; every answer closes the connection.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

_MAX_REQUEST_BYTES = 65536
_CLIENT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: str
    content_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


class Listener:
    """Answers HTTP requests on one address until it is closed."""

    def __init__(self, host: str, port: int, answer: Callable[[str], Answer]) -> None:
        self._answer = answer
        self._socket = socket.create_server((host, port), backlog=64)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, name=f"http-{self.port}", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._reply, args=(connection,), daemon=True).start()

    def _reply(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # whoever asked may leave before the answer
            connection.settimeout(_CLIENT_TIMEOUT_S)
            request = b""
            while b"\r\n\r\n" not in request:
                part = connection.recv(4096)
                if not part or len(request) > _MAX_REQUEST_BYTES:
                    return
                request += part
            words = request.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
            path = words[1].partition("?")[0] if len(words) == 3 else ""
            answer = self._answer(path) if path else Answer(400, "bad request\n")
            connection.sendall(render(answer, with_body=words[0] != "HEAD"))


def render(answer: Answer, *, with_body: bool = True) -> bytes:
    """Return the bytes of an HTTP/1.1 response."""
    body = answer.body.encode()
    headers = {
        "Content-Type": answer.content_type,
        **answer.headers,
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    head = f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return head.encode() + b"\r\n" + (body if with_body else b"")
