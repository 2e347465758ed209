"""What a container has written: kept in memory, bounded, and read back as ``kubectl logs`` asks for it.

::

    stdout ──▶ write(1, b"one\\ntw") ──▶ entry (time, b"one\\n")      pending[1] = b"tw"
    stderr ──▶ write(2, b"oops\\n")  ──▶ entry (time, b"oops\\n")

As with a container runtime, a line appears when it is complete, or when it has grown beyond 16 KiB; all lines that arrive
together carry one time. What is oldest is dropped first. Pure, but for the futures that wake readers.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from testbed.api.streams import STDERR, STDOUT, LogOptions

MAX_BYTES = 4 * 1024 * 1024
"""What is kept of one start of a container."""
_MAX_LINE = 16 * 1024  # containerd's max_container_log_line_size
_LINES = re.compile(rb"[^\n]*\n|[^\n]+")

Listener = Callable[[int, bytes], None]
"""Called with the stream and what has arrived on it; with b"" when the container has ended."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Whole lines of one stream (or a part of a very long one), and when they came."""

    time_ns: int
    stream: int
    data: bytes


class ContainerLog:
    """The output of one start of a container. Implements `runtime.Output`."""

    def __init__(self, clock_ns: Callable[[], int], *, max_bytes: int = MAX_BYTES) -> None:
        self._clock_ns = clock_ns
        self._max_bytes = max_bytes
        self._entries: deque[Entry] = deque()
        self._first = 0  # number of the oldest entry that is kept
        self._size = 0
        self._pending = {STDOUT: b"", STDERR: b""}
        self._listeners: list[Listener] = []
        self._changed: asyncio.Future[None] | None = None
        self.closed = False

    def write(self, stream: int, data: bytes) -> None:
        """Take what has arrived on a stream."""
        for listener in tuple(self._listeners):
            listener(stream, data)
        data = self._pending[stream] + data
        end = data.rfind(b"\n") + 1
        if len(data) - end > _MAX_LINE:
            end = len(data)
        self._pending[stream] = data[end:]
        if end:
            self._add(Entry(self._clock_ns(), stream, data[:end]))

    def close(self) -> None:
        """The container has ended: what is pending is all there will be."""
        for stream, data in self._pending.items():
            if data:
                self._add(Entry(self._clock_ns(), stream, data))
        self._pending = {STDOUT: b"", STDERR: b""}
        self.closed = True
        self._wake()
        for listener in tuple(self._listeners):
            listener(STDOUT, b"")

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Pass on all that arrives from now on; return what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def _add(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._size += len(entry.data)
        while self._size > self._max_bytes and len(self._entries) > 1:
            self._size -= len(self._entries.popleft().data)
            self._first += 1
        self._wake()

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
        self._changed = None

    # -- reading ---------------------------------------------------------------------------------------------------

    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries)

    async def read(self, options: LogOptions) -> AsyncIterator[bytes]:
        """Yield what the options ask for; with ``follow``, what comes later too, until the container has ended."""
        left = options.limit_bytes
        seen = self._first + len(self._entries)
        pieces = selected(self.entries(), options, self._clock_ns())
        while True:
            for piece in pieces:
                if left is not None:
                    piece, left = piece[:left], left - len(piece)
                if piece:
                    yield piece
                if left is not None and left <= 0:
                    return
            if self.closed and seen >= self._first + len(self._entries):
                return
            if not options.follow:
                return
            if seen >= self._first + len(self._entries):
                await self._change()
            # A reader that is too slow misses what has been dropped meanwhile.
            fresh = list(self._entries)[max(0, seen - self._first) :]
            seen = self._first + len(self._entries)
            pieces = iter([b"".join(rendered(entry, options.timestamps) for entry in fresh)])

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)


def selected(entries: tuple[Entry, ...], options: LogOptions, now_ns: int) -> Iterator[bytes]:
    """Yield the text of the entries that ``since`` and ``tailLines`` leave; one entry at a time."""
    since_ns = now_ns - options.since_s * 10**9 if options.since_s is not None else options.since_time_ns
    if since_ns is not None:
        entries = tuple(entry for entry in entries if entry.time_ns >= since_ns)
    if options.tail_lines is not None:
        entries = _tail(entries, options.tail_lines)
    for entry in entries:
        yield rendered(entry, options.timestamps)


def _tail(entries: tuple[Entry, ...], lines: int) -> tuple[Entry, ...]:
    kept: deque[Entry] = deque()
    for entry in reversed(entries):
        if lines <= 0:
            break
        each = _LINES.findall(entry.data)
        kept.appendleft(Entry(entry.time_ns, entry.stream, b"".join(each[-lines:])))
        lines -= len(each)
    return tuple(kept)


def rendered(entry: Entry, timestamps: bool) -> bytes:
    """Return an entry as a client sees it, with its time (RFC 3339, nanoseconds, UTC) before each line if asked for."""
    if not timestamps:
        return entry.data
    seconds, nanoseconds = divmod(entry.time_ns, 10**9)
    day = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    stamp = f"{day}.{nanoseconds:09d}Z ".encode()
    return b"".join(stamp + line for line in _LINES.findall(entry.data))
