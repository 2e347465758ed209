"""What the two ends of the nested kernel's serial line say to each other. Only the standard library: the guest loads it too.

A frame is one byte for its kind, four for the length, and that many bytes::

    host → guest   i data for standard input or the terminal       w rows, columns of the terminal
                   z standard input has ended                      s a signal for the command
                   c nobody reads that output any more (its kind)  k time is up: end everything
    guest → host   o standard output    e standard error    t the terminal    a descriptor 3
                   u so many bytes of input were taken; 0: nobody will read any more
                   g a signal was passed on
                   r everything is set up, the command starts      f that could not be done (text)
                   x the command has ended (status)
"""

from __future__ import annotations

import struct

STDIN, STDIN_END, WINDOW, SIGNAL, CLOSE, END = b"i", b"z", b"w", b"s", b"c", b"k"
STDOUT, STDERR, TERMINAL, ANSWER, TAKEN, GOT, READY, FAILED, EXIT = b"o", b"e", b"t", b"a", b"u", b"g", b"r", b"f", b"x"

ANSWER_FD = 3
"""Where a command that was asked for an answer writes it."""

WINDOW_BYTES = 3072
"""How much input may be under way. The guest keeps what the command does not read. With 32 KiB the line stopped for good here,
presumably as a full terminal buffer (4,096 bytes) throttles it (n_tty.c) and UML's driver does not come back from that."""

_HEADER = struct.Struct("!cI")
_NUMBER = struct.Struct("!I")
_SIZE = struct.Struct("!HH")


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    return _HEADER.pack(kind, len(payload)) + payload


def number(kind: bytes, value: int) -> bytes:
    return frame(kind, _NUMBER.pack(value))


def read_number(payload: bytes) -> int:
    value: int = _NUMBER.unpack(payload)[0]
    return value


def window(rows: int, columns: int) -> bytes:
    return frame(WINDOW, _SIZE.pack(rows, columns))


def read_window(payload: bytes) -> tuple[int, int]:
    """Return rows and columns."""
    rows, columns = _SIZE.unpack(payload)
    return rows, columns


class Frames:
    """Puts frames together from what arrives in pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Return the frames that are complete now, as kind and payload."""
        self._buffer += data
        complete = []
        start = 0
        while len(self._buffer) - start >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._buffer, start)
            end = start + _HEADER.size + length
            if len(self._buffer) < end:
                break
            complete.append((kind, bytes(self._buffer[start + _HEADER.size : end])))
            start = end
        del self._buffer[:start]
        return complete
