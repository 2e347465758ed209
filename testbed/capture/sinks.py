"""Where packets go: a pcapng file or pipe, the last ones of a flight recorder, tcpdump's lines, journeys."""

from __future__ import annotations

import errno
import os
import platform
import re
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from testbed import __version__
from testbed.capture.journeys import Sighting
from testbed.capture.merge import Record
from testbed.capture.pcapng import (
    INBOUND,
    OUTBOUND,
    enhanced_packet,
    interface_description,
    interface_statistics,
    packet_options,
    section_header,
)
from testbed.capture.points import Point
from testbed.capture.processes import PointProcess, check_tcpdump
from testbed.capture.story import Storyteller
from testbed.errors import InputError, KernelError

Seen = tuple[Record, int, Sighting | None]
"""A packet, its direction at its point, and what it belongs to."""


class Sink(Protocol):
    """Takes packets in order. ``finish`` is called once, at the end of the capture."""

    def write(self, batch: Sequence[Seen]) -> None: ...

    def finish(self, processes: Sequence[PointProcess], start_ns: int, end_ns: int) -> None: ...

    def close(self) -> None: ...


# -- pcapng ------------------------------------------------------------------------------------------------------------


class BlockOutput:
    """A file, or a pipe, that always ends behind a whole block as far as that is up to us."""

    def __init__(self, path: str) -> None:
        """``path``: '-' is standard output.

        Raises:
            InputError: it cannot be written.
        """
        self.path = path
        self._count = 0
        try:
            self._fd = (
                os.dup(1) if path == "-" else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            )
        except OSError as error:
            raise InputError(f"cannot write the capture into {path!r}: {error.strerror}") from error

    def write(self, blocks: Sequence[bytes]) -> None:
        """Write blocks whole.

        Raises:
            BrokenPipeError: nobody reads.
            KernelError: the disk is full, or will not take it; what is in the file then is valid.
        """
        view = memoryview(b"".join(blocks))
        done = 0
        try:
            while done < len(view):
                done += os.write(self._fd, view[done:])
        except BrokenPipeError:
            raise
        except OSError as error:
            whole = self._cut(blocks, done)
            raise KernelError(
                f"{self.path}: {error.strerror} after {self._count + whole} blocks; "
                "the file is valid up to there"
                + ("" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ", if it is a file")
            ) from error
        self._count += len(blocks)

    def _cut(self, blocks: Sequence[bytes], done: int) -> int:
        """Take back the piece of a block that is in the file; return how many of the blocks are in it whole."""
        whole, size = 0, 0
        for block in blocks:
            if size + len(block) > done:
                break
            size += len(block)
            whole += 1
        try:
            end = os.lseek(self._fd, 0, os.SEEK_CUR) - (done - size)
            os.ftruncate(self._fd, end)
        except OSError:  # a pipe
            pass
        return whole

    def close(self) -> None:
        os.close(self._fd)


def file_head(points: Sequence[Point], snap_bytes: int, comment: str) -> list[bytes]:
    """Return the blocks that a file begins with."""
    system = f"{platform.system()} {platform.release()}"
    head = [section_header(system=system, application=f"testbed {__version__}", comment=comment)]
    for point in points:
        head.append(
            interface_description(
                point.name, snap_bytes=snap_bytes, mac=point.mac, description=point.about, filter_text=point.filter
            )
        )
    return head


class PcapngSink:
    """Writes a pcapng file; packets of connections carry comments."""

    def __init__(self, output: BlockOutput, head: Sequence[bytes], storyteller: Storyteller) -> None:
        self._output = output
        self._storyteller = storyteller
        self._plain = {direction: packet_options(direction) for direction in (0, INBOUND, OUTBOUND)}
        output.write(head)

    def write(self, batch: Sequence[Seen]) -> None:
        self._output.write(self.blocks(batch))

    def write_blocks(self, blocks: Sequence[bytes]) -> None:
        """Write blocks that `blocks` has made."""
        self._output.write(blocks)

    def blocks(self, batch: Sequence[Seen]) -> list[bytes]:
        plain, options_of = self._plain, self._options
        return [
            enhanced_packet(record, plain[direction] if sighting is None else options_of(sighting, direction))
            for record, direction, sighting in batch
        ]

    def _options(self, sighting: Sighting, direction: int) -> bytes:
        connection, is_forward, step = sighting
        kept = connection.options.get((is_forward, direction))
        if kept is not None and step < 0:
            return kept
        comment = self._storyteller.comment(connection, is_forward)
        made = connection.options[is_forward, direction] = packet_options(direction, [comment])
        if step < 0:
            return made
        where = self._storyteller.step_comment(connection, step, answer=not is_forward)
        return packet_options(direction, [comment, where])

    def finish(self, processes: Sequence[PointProcess], start_ns: int, end_ns: int) -> None:
        self._output.write(statistics_blocks(processes, start_ns, end_ns))

    def close(self) -> None:
        self._output.close()


def statistics_blocks(processes: Sequence[PointProcess], start_ns: int, end_ns: int) -> list[bytes]:
    return [
        interface_statistics(
            number, start_ns=start_ns, end_ns=end_ns, received=process.received, dropped=process.lost,
            delivered=process.received - process.lost, comment=process.gone,
        )
        for number, process in enumerate(processes)
    ]  # fmt: skip


class RecorderSink:
    """Keeps the last packets in memory, at most so many bytes, and writes them at the end: a flight recorder."""

    def __init__(self, inner: PcapngSink, limit_bytes: int) -> None:
        self._inner = inner
        self._limit = limit_bytes
        self._kept: deque[tuple[int, bytes]] = deque()  # time stamp, block
        self._size = 0
        self.dropped = 0
        self._not_before_ns = 0

    def write(self, batch: Sequence[Seen]) -> None:
        for seen, block in zip(batch, self._inner.blocks(batch), strict=True):
            if seen[0].time_ns >= self._not_before_ns:
                self._kept.append((seen[0].time_ns, block))
                self._size += len(block)
        while self._size > self._limit:
            self._size -= len(self._kept.popleft()[1])
            self.dropped += 1

    def forget(self, before_ns: int) -> None:
        """Drop every packet older than this, also those that are still to come."""
        self._not_before_ns = before_ns
        while self._kept and self._kept[0][0] < before_ns:
            self._size -= len(self._kept.popleft()[1])
        self.dropped = 0

    def finish(self, processes: Sequence[PointProcess], start_ns: int, end_ns: int) -> None:
        self._inner.write_blocks([block for _, block in self._kept])
        self._inner.finish(processes, start_ns, end_ns)

    def close(self) -> None:
        self._inner.close()


# -- text --------------------------------------------------------------------------------------------------------------

_PCAP_HEADER = struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 262144, 1)
_PCAP_RECORD = struct.Struct("<IIII")
_STAMPED = re.compile(r"(\d+)\.(\d{9}) (.*)", re.DOTALL)
_COLOURS = (32, 33, 34, 35, 36, 31, 92, 93, 94, 95, 96, 91)
_ARROWS = {INBOUND: "in ", OUTBOUND: "out", 0: "   "}
_LAST_LINES_S = 10.0


class LinesSink:
    """Prints a line for each packet: tcpdump, reading the merged packets from us, says what they are."""

    def __init__(self, points: Sequence[Point], *, colours: bool, print_line: Callable[[str], None]) -> None:
        self._names = [point.name for point in points]
        self._width = max(map(len, self._names))
        self._colours = colours
        self._print = print_line
        self._waiting: deque[tuple[int, int, int]] = deque()  # point, direction, connection's number
        self.failed: OSError | None = None  # nobody reads what we print
        self._tcpdump = subprocess.Popen(
            [check_tcpdump(), "-r", "-", "-nn", "-l", "-K", "-tt", "--time-stamp-precision=nano", "-Z", "root"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True,
        )  # fmt: skip
        assert self._tcpdump.stdin and self._tcpdump.stdout
        self._tcpdump.stdin.write(_PCAP_HEADER)
        self._reader = threading.Thread(target=self._read, name="lines", daemon=True)
        self._reader.start()

    def write(self, batch: Sequence[Seen]) -> None:
        if self.failed is not None:
            raise self.failed
        written = bytearray()
        for (time_ns, point, length, data), direction, sighting in batch:
            seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
            self._waiting.append((point, direction, sighting.connection.number if sighting else 0))
            written += _PCAP_RECORD.pack(seconds, nanoseconds, len(data), length) + data
        view = memoryview(written)
        assert self._tcpdump.stdin
        while view:
            view = view[self._tcpdump.stdin.write(view) or 0 :]

    def _read(self) -> None:
        assert self._tcpdump.stdout
        colour, known = "", False
        with open(self._tcpdump.stdout.fileno(), encoding="utf-8", errors="replace", closefd=False) as lines:
            for line in lines:
                stamped = _STAMPED.match(line.rstrip("\n"))
                if stamped is None:  # some packets have further lines
                    text = line.rstrip("\n")
                else:
                    point, direction, number = self._waiting.popleft()
                    seconds, rest, what = stamped.groups()
                    at = f"{time.strftime('%H:%M:%S', time.localtime(int(seconds)))}.{rest}"
                    colour, known = str(_COLOURS[number % len(_COLOURS)]), bool(number)
                    text = f"{at}  {self._names[point]:<{self._width}} {_ARROWS[direction]}  {what}"
                try:
                    self._print(f"\033[{colour}m{text}\033[0m" if self._colours and known else text)
                except OSError as error:
                    self.failed = error
                    return

    def finish(self, processes: Sequence[PointProcess], start_ns: int, end_ns: int) -> None:
        assert self._tcpdump.stdin
        self._tcpdump.stdin.close()
        self._reader.join(_LAST_LINES_S)
        if self.failed is not None:
            raise self.failed

    def close(self) -> None:
        self._tcpdump.kill()
        self._tcpdump.wait()
        for stream in (self._tcpdump.stdin, self._tcpdump.stdout):
            if stream is not None and not self._reader.is_alive():
                stream.close()


def open_file(path: str) -> BlockOutput:
    """Open what ``-w`` names.

    Raises:
        InputError: it cannot be written, or is a terminal.
    """
    if path == "-" and sys.stdout.isatty():
        raise InputError("-w - writes packets to standard output, which is a terminal: `… -w - | wireshark -k -i -`")
    if path != "-" and Path(path).is_dir():
        raise InputError(f"cannot write the capture into {path!r}: it is a folder")
    return BlockOutput(path)
