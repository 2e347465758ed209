"""The kubelets' runtime: requests to the spawner, from inside the control process's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address
from typing import Any

from testbed.errors import LabError
from testbed.kubelet.runtime import ContainerSpec, ExecResult, ExitStatus, Output, SandboxSpec
from testbed.lab.frames import FrameReader, pack_frame
from testbed.lab.sessions import FdInput, FdSession, Feed

_LAST_WORDS_S = 1.0


class SpawnerRuntime:
    """Implements `kubelet.runtime.Runtime`. Made inside a running event loop."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = FrameReader(connection)
        self._unsent = bytearray()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[Any, list[int]]]] = {}
        self._ends: dict[str, asyncio.Future[ExitStatus]] = {}  # of containers and execs
        self._feeds: dict[str, Feed] = {}
        self._inputs: dict[str, FdInput] = {}
        self._loop = asyncio.get_running_loop()
        self.gone = self._loop.create_future()
        self._loop.add_reader(connection, self._read)

    async def create_sandbox(self, spec: SandboxSpec) -> None:
        await self._ask("create_sandbox", spec=spec)

    async def remove_sandbox(self, pod_uid: str) -> None:
        await self._ask("remove_sandbox", pod_uid=pod_uid)

    async def update_volume(self, pod_uid: str, volume: str, files: Mapping[str, str]) -> None:
        await self._ask("update_volume", pod_uid=pod_uid, volume=volume, files=dict(files))

    async def start_container(self, spec: ContainerSpec, output: Output) -> FdInput:
        self._ends[spec.container_id] = self._loop.create_future()
        try:
            _, fds = await self._ask_with_fds("start_container", spec=spec)
        except BaseException:
            del self._ends[spec.container_id]
            raise
        sources, input_fd = _sides(fds, tty=spec.tty)
        self._feeds[spec.container_id] = Feed(sources, output)
        made = self._inputs[spec.container_id] = FdInput(input_fd, tty=spec.tty)
        return made

    async def wait_container(self, container_id: str) -> ExitStatus:
        feed = self._feeds[container_id]
        status = await asyncio.shield(self._ends[container_id])
        with contextlib.suppress(TimeoutError):  # its last words belong to it
            async with asyncio.timeout(_LAST_WORDS_S):
                await feed.ended.wait()
        return status

    async def signal_container(self, container_id: str, signal: int) -> None:
        await self._ask("signal_container", container_id=container_id, signal_number=signal)

    async def remove_container(self, container_id: str) -> None:
        await self._ask("remove_container", container_id=container_id)
        self._ends.pop(container_id, None)
        made = self._inputs.pop(container_id, None)
        if made is not None:
            made.leave_input()
            self._feeds.pop(container_id).stop()

    async def exec(self, container_id: str, argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        answer: ExecResult = await self._ask("exec", container_id=container_id, argv=tuple(argv), timeout_s=timeout_s)
        return answer

    async def open_exec(self, container_id: str, argv: Sequence[str], *, stdin: bool, tty: bool) -> FdSession:
        exec_id = secrets.token_hex(8)
        self._ends[exec_id] = self._loop.create_future()
        try:
            _, fds = await self._ask_with_fds(
                "open_exec", container_id=container_id, exec_id=exec_id, argv=tuple(argv), stdin=stdin, tty=tty
            )
        except BaseException:
            del self._ends[exec_id]
            raise
        sources, input_fd = _sides(fds, tty=tty)
        end = self._ends[exec_id]
        end.add_done_callback(lambda _: self._ends.pop(exec_id, None))
        return FdSession(sources, input_fd, tty=tty, wait=lambda: asyncio.shield(end))

    async def connect(self, node: str, address: IPv4Address, port: int, *, timeout_s: float) -> socket.socket:
        return await self._connect(str(address), port, timeout_s, node=node)

    async def connect_pod(self, pod_uid: str, port: int, *, timeout_s: float) -> socket.socket:
        return await self._connect("127.0.0.1", port, timeout_s, pod_uid=pod_uid)

    async def _connect(self, address: str, port: int, timeout_s: float, **where: str) -> socket.socket:
        _, fds = await self._ask_with_fds("connect", **where)
        made = socket.socket(fileno=fds[0])
        try:
            async with asyncio.timeout(timeout_s):
                await self._loop.sock_connect(made, (address, port))
        except BaseException:
            made.close()
            raise
        return made

    async def set_link(self, where: str, *, up: bool) -> None:
        """Plug or unplug the LAN link of a node or outside host."""
        await self._ask("set_link", where=where, up=up)

    async def _ask(self, operation: str, **arguments: Any) -> Any:
        return (await self._ask_with_fds(operation, **arguments))[0]

    async def _ask_with_fds(self, operation: str, **arguments: Any) -> tuple[Any, list[int]]:
        if self.gone.done():
            raise LabError("the spawner has died")
        number = next(self._numbers)
        future = self._waiting[number] = self._loop.create_future()
        self._send(pack_frame((number, operation, arguments)))
        value, fds = await future
        if isinstance(value, Exception):
            raise value
        return value, fds

    def _send(self, frame: bytes) -> None:
        """Send a request, or as soon as the spawner has read those before it: it does one after the other."""
        is_waiting = bool(self._unsent)
        self._unsent += frame
        if not is_waiting:
            self._flush()
            if self._unsent:
                self._loop.add_writer(self._connection, self._flush)

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):  # when it is gone, reading says so
            del self._unsent[: self._connection.send(self._unsent, socket.MSG_DONTWAIT)]
        if not self._unsent:
            self._loop.remove_writer(self._connection)

    def _read(self) -> None:
        try:
            messages = self._reader.receive()
        except ConnectionError:
            messages = None
        if messages is None:
            self._loop.remove_reader(self._connection)
            self._loop.remove_writer(self._connection)
            self.gone.set_result(None)
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(LabError("the spawner has died"))
            return
        for (number, value), fds in messages:
            if number is None:
                _, container_id, status = value
                end = self._ends.get(container_id)
                if end is not None and not end.done():
                    end.set_result(status)
                continue
            waiting = self._waiting.pop(number)
            if waiting.cancelled():
                for fd in fds:
                    os.close(fd)
            else:
                waiting.set_result((value, fds))


def _sides(fds: list[int], *, tty: bool) -> tuple[dict[int, int], int]:
    """Return descriptor -> stream, and the descriptor to write to (-1: none), of what the spawner has sent."""
    if tty:
        return {fds[0]: 1}, os.dup(fds[0])
    return {fds[0]: 1, fds[1]: 2}, fds[2] if len(fds) > 2 else -1
