"""Port-forwarding over a websocket: SPDY frames in its messages (kubectl), or one channel pair a port (Python client)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import WSMsgType, web

from testbed.api.spdy import Decoder, Encoder, Frame, Kind, SpdyError
from testbed.errors import ApiError, KernelError
from testbed.model.objects import Object

SPDY_TUNNEL = "SPDY/3.1+portforward.k8s.io"  # apimachinery/pkg/util/portforward/constants.go
_CHUNK = 32 * 1024
_PROTOCOL_ERROR = 1  # of RST_STREAM

Connect = Callable[[int], Awaitable[socket.socket]]


def failure_text(pod: Object, port: int, error: Exception) -> str:
    """Return what the error stream says of a connection that could not be made, in containerd's words."""
    words = str(error)
    if isinstance(error, OSError):
        reason = os.strerror(error.errno).lower() if error.errno else "i/o timeout"
        if error.errno == errno.ECONNREFUSED or not error.errno:
            reason = f"connect: {reason}" if error.errno else reason
        words = (
            f'failed to connect to localhost:{port} inside namespace "{pod["metadata"]["uid"]}", '
            f"IPv4: dial tcp4 127.0.0.1:{port}: {reason} IPv6 dial tcp6: address localhost: no suitable address "
        )
    return f"error forwarding port {port} to pod {pod['metadata']['uid']}, uid : {words}"


@dataclass(slots=True)
class _Pair:
    """The streams of one forwarded connection, until both are there."""

    port: int
    error: int = 0
    data: int = 0


class _Tunnel:
    """One port-forward: any number of connections through one websocket."""

    def __init__(self, websocket: web.WebSocketResponse, connect: Connect, pod: Object) -> None:
        self._websocket = websocket
        self._connect = connect
        self._pod = pod
        self._encoder = Encoder()
        self._pairs: dict[str, _Pair] = {}  # by requestID
        self._writers: dict[int, asyncio.StreamWriter] = {}  # by data stream
        self._early: dict[int, list[Frame]] = {}  # data streams whose connection is being made
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by data stream

    async def serve(self) -> None:
        decoder = Decoder()
        try:
            async for message in self._websocket:
                if message.type is not WSMsgType.BINARY:
                    continue
                for frame in decoder.receive(message.data):
                    if frame.kind is Kind.GOAWAY:
                        return
                    await self._take(frame)
        except (SpdyError, ConnectionError):
            return
        finally:
            for task in tuple(self._tasks.values()):
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            with contextlib.suppress(ConnectionError):
                await self._websocket.close()

    async def _take(self, frame: Frame) -> None:
        if frame.kind is Kind.SYN_STREAM:
            await self._open(frame)
        elif frame.kind is Kind.PING and frame.stream % 2:  # odd: theirs; even would be an answer to ours
            await self._send(self._encoder.ping(frame.stream))
        elif frame.kind is Kind.DATA:
            if frame.stream in self._early:
                self._early[frame.stream].append(frame)
            else:
                await self._pass_on(frame)
        elif frame.kind is Kind.RST_STREAM and frame.stream in self._tasks:
            self._tasks[frame.stream].cancel()

    async def _open(self, frame: Frame) -> None:
        headers = dict(frame.headers)
        kind, port = headers.get("streamtype", ""), headers.get("port", "")
        if kind not in ("data", "error") or not (port.isdecimal() and 0 < int(port) < 65536):
            await self._send(self._encoder.reset(frame.stream, _PROTOCOL_ERROR))
            return
        await self._send(self._encoder.syn_reply(frame.stream))
        pair = self._pairs.setdefault(headers.get("requestid", ""), _Pair(int(port)))
        if kind == "error":
            pair.error = frame.stream
        else:
            pair.data = frame.stream
        if pair.error and pair.data:
            del self._pairs[headers.get("requestid", "")]
            self._early[pair.data] = []
            task = asyncio.create_task(self._forward(pair), name=f"forward to {pair.port}")
            self._tasks[pair.data] = task
            task.add_done_callback(lambda _: self._tasks.pop(pair.data, None))

    async def _forward(self, pair: _Pair) -> None:
        try:
            try:
                connection = await self._connect(pair.port)
            except (OSError, KernelError, ApiError) as error:
                text = failure_text(self._pod, pair.port, error).encode()
                await self._send(self._encoder.data(pair.error, text, is_last=True))
                await self._send(self._encoder.data(pair.data, b"", is_last=True))
                return
            reader, writer = await asyncio.open_connection(sock=connection)
            self._writers[pair.data] = writer
            while self._early[pair.data]:  # more may come while these are passed on
                await self._pass_on(self._early[pair.data].pop(0))
            del self._early[pair.data]
            try:
                while data := await reader.read(_CHUNK):
                    await self._send(self._encoder.data(pair.data, data))
            except OSError:
                pass  # reset by the pod: for the client that is the end of the data
            finally:
                self._writers.pop(pair.data, None)
                writer.close()
            await self._send(self._encoder.data(pair.data, b"", is_last=True))
            await self._send(self._encoder.data(pair.error, b"", is_last=True))
        finally:
            self._early.pop(pair.data, None)

    async def _pass_on(self, frame: Frame) -> None:
        writer = self._writers.get(frame.stream)
        if writer is None:
            return  # an error stream, or one whose connection has ended
        with contextlib.suppress(OSError):
            if frame.data:
                writer.write(frame.data)
                await writer.drain()
            if frame.is_last:
                writer.write_eof()

    async def _send(self, data: bytes) -> None:
        await self._websocket.send_bytes(data)


async def serve_tunnel(websocket: web.WebSocketResponse, connect: Connect, pod: Object) -> None:
    """Serve SPDY streams in pairs (``streamType`` error and data, of one ``requestID``) until the client goes."""
    await _Tunnel(websocket, connect, pod).serve()


async def serve_channels(websocket: web.WebSocketResponse, connect: Connect, pod: Object, ports: list[int]) -> None:
    """Serve one connection a port: channel 2i carries its data, 2i+1 errors; each begins with the port, little-endian.

    Source: kubernetes pkg/kubelet/cri/streaming/portforward/websocket.go (v1.30).
    """
    writers: dict[int, asyncio.StreamWriter] = {}
    for number, port in enumerate(ports):
        for channel in (2 * number, 2 * number + 1):
            await websocket.send_bytes(bytes([channel]) + port.to_bytes(2, "little"))

    async def forward(number: int, port: int) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=await connect(port))
        except (OSError, KernelError, ApiError) as error:
            await websocket.send_bytes(bytes([2 * number + 1]) + failure_text(pod, port, error).encode())
            return
        writers[2 * number] = writer
        connected[number].set()
        try:
            while data := await reader.read(_CHUNK):
                await websocket.send_bytes(bytes([2 * number]) + data)
        except OSError:
            pass
        finally:
            writers.pop(2 * number, None)
            writer.close()

    async def receive() -> None:
        async for message in websocket:
            if message.type is not WSMsgType.BINARY or not message.data or message.data[0] % 2:
                continue
            number = message.data[0] // 2
            if number >= len(ports):
                continue
            wait = asyncio.ensure_future(connected[number].wait())
            await asyncio.wait([wait, tasks[number]], return_when=asyncio.FIRST_COMPLETED)
            wait.cancel()
            writer = writers.get(message.data[0])
            if writer is not None:
                with contextlib.suppress(OSError):
                    writer.write(message.data[1:])
                    await writer.drain()

    connected = [asyncio.Event() for _ in ports]
    tasks = [asyncio.create_task(forward(number, port)) for number, port in enumerate(ports)]
    receiving = asyncio.create_task(receive())
    try:
        forwarding = asyncio.gather(*tasks, return_exceptions=True)
        either: set[asyncio.Future[Any]] = {receiving, forwarding}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        with contextlib.suppress(ConnectionError):
            await websocket.close()
    finally:
        for task in (*tasks, receiving):
            task.cancel()
        await asyncio.gather(*tasks, receiving, return_exceptions=True)
