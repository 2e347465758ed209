"""Our side of a program's streams, inside the control process's event loop. Descriptors are non-blocking and ours to close."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import termios
from collections.abc import Awaitable, Callable
from typing import Any

from testbed.kubelet.runtime import ExitStatus, Output

_CHUNK = 64 * 1024
# A program that writes without end may not take the whole control process: 64 KiB, then others have their turn.
_PAUSE_S = 0.005
# Somebody whom the program has left behind may hold its streams open for ever.
_DRAIN_S = 0.5


class Feed:
    """Moves what arrives on descriptors into an `Output`, which is closed when all of them have ended."""

    def __init__(self, sources: dict[int, int], output: Output) -> None:
        """``sources``: descriptor -> stream."""
        self._loop = asyncio.get_running_loop()
        self._open = dict(sources)
        self._output = output
        self.ended = asyncio.Event()
        for fd in sources:
            os.set_blocking(fd, False)
            self._loop.add_reader(fd, self._read, fd)

    def _read(self, fd: int) -> None:
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return
        except OSError:  # EIO: nobody holds the other side of a terminal any more
            data = b""
        if data:
            self._output.write(self._open[fd], data)
            if len(data) == _CHUNK:
                self._loop.remove_reader(fd)
                self._loop.call_later(_PAUSE_S, self._resume, fd)
            return
        self._close(fd)

    def _resume(self, fd: int) -> None:
        if fd in self._open:
            self._loop.add_reader(fd, self._read, fd)

    def _close(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        del self._open[fd]
        os.close(fd)
        if not self._open:
            self._output.close()
            self.ended.set()

    def stop(self) -> None:
        """Read no more, whatever may still come."""
        for fd in tuple(self._open):
            self._close(fd)


class FdInput:
    """Implements `runtime.Input` on a descriptor: a pipe's end, or (``tty``) a copy of a terminal's. -1: there is none."""

    def __init__(self, fd: int, *, tty: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self._tty = tty
        if fd >= 0:
            os.set_blocking(fd, False)

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view and self._fd >= 0:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                await self._writable()
            except OSError:  # EPIPE, EIO: nobody reads any more
                self.leave_input()

    async def _writable(self) -> None:
        fd, ready = self._fd, asyncio.Event()
        self._loop.add_writer(fd, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_writer(fd)

    def close(self) -> None:
        if self._tty and self._fd >= 0:
            with contextlib.suppress(OSError):  # ^D at the beginning of a line: the end of the file, to a terminal
                os.write(self._fd, b"\x04")
            return
        self.leave_input()

    def leave_input(self) -> None:
        if self._fd >= 0:
            self._loop.remove_writer(self._fd)
            os.close(self._fd)
            self._fd = -1

    def resize(self, columns: int, rows: int) -> None:
        if self._tty and self._fd >= 0:
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class FdSession(FdInput):
    """Implements `runtime.Session`: what is not read here waits in the pipe, and the program with it."""

    def __init__(
        self, sources: dict[int, int], input_fd: int, *, tty: bool, wait: Callable[[], Awaitable[ExitStatus]]
    ) -> None:  # fmt: skip
        super().__init__(input_fd, tty=tty)
        self._wait = wait
        self._quiet = False  # nothing has come since it was last looked at
        self._queue: asyncio.Queue[tuple[int, bytes] | None] = asyncio.Queue(maxsize=8)
        self._readers = [
            asyncio.create_task(self._read_all(fd, stream), name="exec output") for fd, stream in sources.items()
        ]
        self._end = asyncio.create_task(self._watch_end(), name="exec end")

    async def _read_all(self, fd: int, stream: int) -> None:
        os.set_blocking(fd, False)
        try:
            while True:
                try:
                    data = os.read(fd, _CHUNK)
                except BlockingIOError:
                    await self._readable(fd)
                    continue
                except OSError:
                    return
                if not data:
                    return
                self._quiet = False
                await self._queue.put((stream, data))
        finally:
            os.close(fd)

    async def _readable(self, fd: int) -> None:
        ready = asyncio.Event()
        self._loop.add_reader(fd, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_reader(fd)

    async def _watch_end(self) -> None:
        ended = asyncio.ensure_future(self._wait())
        reading = set(self._readers)
        while reading:
            over: set[asyncio.Future[Any]] = {*reading} if ended.done() else {*reading, ended}
            done, _ = await asyncio.wait(over, timeout=_DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
            reading = {reader for reader in reading if not reader.done()}
            # Ended, nothing came for a while, and nothing waits to be fetched: whoever still holds the streams is quiet.
            if ended.done() and not done and self._queue.empty() and self._quiet:
                break
            self._quiet = True
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        ended.cancel()
        await self._queue.put(None)

    async def read(self) -> tuple[int, bytes] | None:
        return await self._queue.get()

    async def wait(self) -> ExitStatus:
        return await self._wait()

    def leave(self) -> None:
        self._end.cancel()
        for reader in self._readers:
            reader.cancel()
        self.leave_input()
