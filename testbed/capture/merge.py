"""Many captures as one, in the order of their time stamps. Pure: bytes and the time of day in, records out.

Each tcpdump writes a pcap stream, in its own time: the kernel hands packets over in blocks, up to a second after they were
there (tcpdump's time-out of a block). So a record is let go when no point can still come with an earlier one: each has
shown a later one, or had nothing to say for longer than `SETTLE_NS`.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from testbed.errors import KernelError

SETTLE_NS = 1_300_000_000
"""A block's time-out (1 s), and 0.3 s for tcpdump to be given the processor: for people who watch."""
SETTLE_FOR_FILES_NS = 3_000_000_000
"""The same for files, whose readers can wait, on a machine that is busy."""
_JITTER_NS = 1_000_000
"""Within one point, packets of two processors may be stamped in another order than they are queued in."""
_NANOSECOND_MAGIC = 0xA1B23C4D
_FILE_HEADER = struct.Struct("<IHHiIII")
_RECORD = struct.Struct("<IIII")
_BILLION = 1_000_000_000


class Record(NamedTuple):
    """A packet at a point: nanoseconds since 1970, the point's number, the length on the wire, the captured bytes."""

    time_ns: int
    point: int
    length: int
    data: bytes


class _Stream:
    """What one tcpdump has written so far and is not whole yet."""

    __slots__ = ("ended", "header_read", "known_until_ns", "rest")

    def __init__(self) -> None:
        self.rest = b""
        self.header_read = False
        self.known_until_ns = 0
        self.ended = False


class Merger:
    """Puts the packets of several points in order."""

    def __init__(self, points: int, *, settle_ns: int = SETTLE_NS) -> None:
        """``settle_ns``: how long a point must have been quiet for what others had so long ago to be let go."""
        self._settle_ns = settle_ns
        self._streams = [_Stream() for _ in range(points)]
        self._pending: list[Record] = []
        self._let_go_ns = 0
        self.late = 0  # records that came behind later ones that were let go already

    def feed(self, point: int, data: bytes) -> int:
        """Take what a point's tcpdump has written; return how many packets became whole by it.

        Raises:
            KernelError: it is no pcap stream with nanoseconds.
        """
        stream = self._streams[point]
        buffer = stream.rest + data if stream.rest else data
        at, end = 0, len(buffer)
        if not stream.header_read:
            if end < _FILE_HEADER.size:
                stream.rest = buffer
                return 0
            magic = _FILE_HEADER.unpack_from(buffer)[0]
            if magic != _NANOSECOND_MAGIC:
                raise KernelError(f"tcpdump writes no pcap stream with nanoseconds (it begins with {magic:#010x})")
            stream.header_read = True
            at = _FILE_HEADER.size
        append, unpack, make = self._pending.append, _RECORD.unpack_from, tuple.__new__
        before, time_ns = len(self._pending), 0
        while at + 16 <= end:
            seconds, nanoseconds, captured, length = unpack(buffer, at)
            begin = at + 16
            if begin + captured > end:
                break
            at = begin + captured
            time_ns = seconds * _BILLION + nanoseconds
            append(make(Record, (time_ns, point, length, buffer[begin:at])))
        stream.rest = buffer[at:]
        if time_ns:
            stream.known_until_ns = max(stream.known_until_ns, time_ns - _JITTER_NS)
        return len(self._pending) - before

    def is_quiet(self, point: int, now_ns: int) -> None:
        """A point's pipe was found empty at this time of day."""
        stream = self._streams[point]
        stream.known_until_ns = max(stream.known_until_ns, now_ns - self._settle_ns)

    def end(self, point: int) -> None:
        """A point says no more."""
        self._streams[point].ended = True

    @property
    def waiting(self) -> int:
        """How many packets are held back."""
        return len(self._pending)

    def ready(self) -> Sequence[Record]:
        """Return the records that no earlier one can follow, in order; all of them when every point has ended."""
        pending = self._pending
        if not pending:
            return ()
        pending.sort(key=itemgetter(0))
        living = [stream.known_until_ns for stream in self._streams if not stream.ended]
        cut = bisect_right(pending, min(living), key=itemgetter(0)) if living else len(pending)
        if not cut:
            return ()
        if pending[0].time_ns < self._let_go_ns:
            self.late += bisect_right(pending, self._let_go_ns - 1, 0, cut, key=itemgetter(0))
        self._let_go_ns = max(self._let_go_ns, pending[cut - 1].time_ns)
        batch = pending[:cut]
        del pending[:cut]
        return batch
