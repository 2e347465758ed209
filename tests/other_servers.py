"""Servers that are no pods of ours, as backends of an Ingress: FastCGI, gRPC (with and without TLS), HTTPS, one that lets its
clients change the protocol, and one that remembers.

Each says what it was asked. All of them end when `stop` connects. They run where `Lab.call` puts them: on an outside host.
"""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import h2.config
import h2.connection
import h2.events

FCGI, GRPC, GRPCS, RECORDER, HTTPS, UPGRADE, CONTROL = 9000, 9001, 9002, 9003, 9004, 9005, 9009
_FCGI_BEGIN, _FCGI_END, _FCGI_PARAMS, _FCGI_STDIN, _FCGI_STDOUT = 1, 3, 4, 5, 6


def serve(certificate: bytes, key: bytes) -> None:
    """Serve all of them until `stop`; the certificate is that of GRPCS and HTTPS."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(certificate + key)
        file.flush()
        contexts = {protocol: _context(file.name, protocol) for protocol in ("h2", "http/1.1")}
    _accept(FCGI, _fastcgi)
    _accept(GRPC, _grpc)
    _accept(GRPCS, lambda plain: _grpc(contexts["h2"].wrap_socket(plain, server_side=True)))
    _accept(HTTPS, lambda plain: _tls_only(contexts["http/1.1"].wrap_socket(plain, server_side=True)))
    _accept(UPGRADE, _upgrade)
    recorder = http.server.ThreadingHTTPServer(("0.0.0.0", RECORDER), _Recorder)
    threading.Thread(target=recorder.serve_forever, daemon=True).start()
    with socket.create_server(("0.0.0.0", CONTROL)) as control:
        control.accept()


def _context(file: str, protocol: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    context.set_alpn_protocols([protocol])
    return context


def stop() -> None:
    """End `serve`; from the same place."""
    socket.create_connection(("127.0.0.1", CONTROL), timeout=5).close()


def recorded() -> list[dict[str, Any]]:
    """Return what the recorder was asked; from the same place."""
    with socket.create_connection(("127.0.0.1", RECORDER), timeout=5) as made:
        made.sendall(b"GET /recorded HTTP/1.0\r\n\r\n")
        text = b"".join(iter(lambda: made.recv(65536), b""))
    found: list[dict[str, Any]] = json.loads(text.partition(b"\r\n\r\n")[2])
    return found


def _accept(port: int, talk: Callable[[Any], None]) -> None:
    listener = socket.create_server(("0.0.0.0", port))

    def run() -> None:
        while True:
            made, _ = listener.accept()
            made.settimeout(30)
            threading.Thread(target=talk, args=(made,), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()


class _Recorder(http.server.BaseHTTPRequestHandler):
    """Remembers what it was asked, and tells it at ``/recorded``."""

    seen: list[dict[str, Any]] = []  # noqa: RUF012  # of the process: a handler lives for one connection

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if self.path != "/recorded":
            self.seen.append(
                {"method": self.command, "path": self.path, "host": self.headers.get("Host", ""), "body": body}
            )
        text = json.dumps(self.seen).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = _any  # noqa: N815  # names of the library

    def log_message(self, *_: Any) -> None:
        """Say nothing: the tests' output is not the place."""


def _tls_only(made: ssl.SSLSocket) -> None:
    with made:
        made.recv(65536)
        text = json.dumps({"pod": "https", "version": made.version()}).encode()
        made.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(text) + text)


def _upgrade(made: socket.socket) -> None:
    """Change the protocol to one that sends everything back, as WebSocket's handshake does (RFC 9110, 7.8)."""
    with made:
        head = made.recv(65536).lower()
        if b"\r\nupgrade: echo\r\n" not in head or b"\r\nconnection: upgrade\r\n" not in head:
            made.sendall(b"HTTP/1.1 426 Upgrade Required\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            return
        made.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n")
        while data := made.recv(65536):
            made.sendall(data)


# --- FastCGI (specification 1.0, sections 3.3 and 5) --------------------------------------------------------------------


def _fastcgi(made: socket.socket) -> None:
    with made, made.makefile("rb") as stream:
        parameters, body = b"", b""
        while True:
            _, kind, request, length, padding, _ = struct.unpack("!BBHHBB", stream.read(8))
            content = stream.read(length + padding)[:length]
            if kind == _FCGI_PARAMS:
                parameters += content
            elif kind == _FCGI_STDIN and content:
                body += content
            elif kind == _FCGI_STDIN:
                break
        said = {"pod": "fastcgi", "parameters": _name_values(parameters), "body": body.decode()}
        answer = b"Status: 201 Created\r\nContent-Type: application/json\r\n\r\n" + json.dumps(said).encode()
        for kind, content in ((_FCGI_STDOUT, answer), (_FCGI_STDOUT, b""), (_FCGI_END, bytes(8))):
            made.sendall(struct.pack("!BBHHBB", 1, kind, request, len(content), 0, 0) + content)


def _name_values(data: bytes) -> dict[str, str]:
    found, at = {}, 0

    def length() -> int:
        nonlocal at
        if data[at] < 128:
            at += 1
            return data[at - 1]
        at += 4
        return int(struct.unpack("!I", data[at - 4 : at])[0]) & 0x7FFFFFFF

    while at < len(data):
        name_length, value_length = length(), length()
        name, value = data[at : at + name_length], data[at + name_length : at + name_length + value_length]
        at += name_length + value_length
        found[name.decode()] = value.decode()
    return found


# --- gRPC: HTTP/2 with trailers -----------------------------------------------------------------------------------------


def _grpc(made: socket.socket) -> None:
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
    connection.initiate_connection()
    asked: dict[int, tuple[dict[str, str], bytes]] = {}
    with made:
        made.sendall(connection.data_to_send())
        while data := made.recv(65536):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    asked[event.stream_id] = dict(event.headers), b""
                elif isinstance(event, h2.events.DataReceived):
                    headers, body = asked[event.stream_id]
                    asked[event.stream_id] = headers, body + event.data
                    connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    headers, body = asked.pop(event.stream_id)
                    said = {
                        "pod": "grpc",
                        "tls": isinstance(made, ssl.SSLSocket),
                        "headers": headers,
                        "body": body.decode(),
                    }
                    connection.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
                    connection.send_data(event.stream_id, json.dumps(said).encode())
                    connection.send_headers(event.stream_id, [("grpc-status", "0")], end_stream=True)
            made.sendall(connection.data_to_send())
