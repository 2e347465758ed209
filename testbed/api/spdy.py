"""SPDY/3.1 framing, as far as ``kubectl port-forward`` needs it: bytes in, frames out, and back. Pure.

kubectl 1.31 and newer carry SPDY's bytes in the binary messages of a websocket (KEP-4006), one stream pair a connection.
There is no flow control: the library on the other side (moby/spdystream) has none, either.

Source: draft-mbelshe-httpbis-spdy-00, sections 2.2 (framing), 2.6 (frames), 2.6.10 (header block and its dictionary).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

_WORDS = """
options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow
authorization cache-control connection content-base content-encoding content-language content-length
content-location content-md5 content-range content-type date etag expect expires from host if-match
if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma
proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade
user-agent vary via warning www-authenticate method get status
""".split()  # noqa: SIM905  # three lines are easier to read than sixty
_PHRASES = ["200 OK", "version", "HTTP/1.1", "url", "public", "set-cookie", "keep-alive", "origin"]
_TAIL = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden"
    "404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,"
    "publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)
DICTIONARY = b"".join(struct.pack(">I", len(one)) + one.encode() for one in (*_WORDS, *_PHRASES)) + _TAIL.encode()
"""The preset dictionary of the headers' compression (section 2.6.10.1); its Adler-32 is e3c6a7c2."""

FIN = 0x01
MAX_FRAME = 1 << 24
_MAX_HEADERS = 64 * 1024  # of one block, decompressed: ours are three short lines
_VERSION = 3


class Kind(IntEnum):
    """Types of control frames that mean something here; data frames are DATA."""

    DATA = 0
    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    PING = 6
    GOAWAY = 7
    HEADERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame. ``stream`` is 0 where none is meant; of a PING it is the number to send back."""

    kind: Kind
    stream: int = 0
    is_last: bool = False  # the sender will send no more on this stream
    headers: tuple[tuple[str, str], ...] = ()  # names in lower case
    data: bytes = b""


class SpdyError(ValueError):
    """What arrived is not SPDY/3: the connection cannot go on."""


class Decoder:
    """Puts frames together from what arrives."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)

    def receive(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that are complete now; frames of no interest are left out.

        Raises:
            SpdyError: another version, or headers that cannot be read.
        """
        self._buffer += data
        while len(self._buffer) >= 8:
            first, second = struct.unpack_from(">II", self._buffer)
            flags, length = second >> 24, second & 0xFFFFFF
            if len(self._buffer) < 8 + length:
                return
            body = bytes(self._buffer[8 : 8 + length])
            del self._buffer[: 8 + length]
            if not first & 0x80000000:
                yield Frame(kind=Kind.DATA, stream=first, is_last=bool(flags & FIN), data=body)
                continue
            if (first >> 16) & 0x7FFF != _VERSION:
                raise SpdyError(f"SPDY version {(first >> 16) & 0x7FFF} instead of {_VERSION}")
            frame = self._control(first & 0xFFFF, flags, body)
            if frame is not None:
                yield frame

    def _control(self, kind: int, flags: int, body: bytes) -> Frame | None:
        if kind not in (one.value for one in Kind if one is not Kind.DATA) or len(body) < 4:
            return None  # SETTINGS, WINDOW_UPDATE and what later versions may have
        stream = int.from_bytes(body[:4], "big")
        if kind == Kind.PING:
            return Frame(kind=Kind.PING, stream=stream)
        headers: tuple[tuple[str, str], ...] = ()
        skipped = {Kind.SYN_STREAM: 10, Kind.SYN_REPLY: 4, Kind.HEADERS: 4}.get(Kind(kind))
        if skipped is not None:
            headers = self._headers(body[skipped:])
        return Frame(kind=Kind(kind), stream=stream & 0x7FFFFFFF, is_last=bool(flags & FIN), headers=headers)

    def _headers(self, block: bytes) -> tuple[tuple[str, str], ...]:
        try:
            text = self._inflate.decompress(block, _MAX_HEADERS)
            (count,), at = struct.unpack_from(">I", text), 4
            values = []
            for _ in range(2 * count):
                (length,) = struct.unpack_from(">I", text, at)
                at += 4 + length
                if at > len(text):
                    raise SpdyError("a header is longer than its block")
                values.append(text[at - length : at].decode())
        except (zlib.error, struct.error, UnicodeDecodeError) as error:
            raise SpdyError(f"headers cannot be read: {error}") from error
        if self._inflate.unconsumed_tail:
            raise SpdyError(f"headers of more than {_MAX_HEADERS} bytes")
        return tuple((name.lower(), value) for name, value in zip(values[::2], values[1::2], strict=True))


class Encoder:
    """Makes the bytes of frames; headers share one compressed stream, so frames must be sent in the order made."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(zdict=DICTIONARY)

    def data(self, stream: int, data: bytes, *, is_last: bool = False) -> bytes:
        """Return a data frame; ``data`` must be shorter than 16 MiB."""
        return struct.pack(">II", stream, (FIN if is_last else 0) << 24 | len(data)) + data

    def syn_stream(self, stream: int, headers: Mapping[str, str]) -> bytes:
        return self._control(Kind.SYN_STREAM, struct.pack(">IIH", stream, 0, 0) + self._headers(headers))

    def syn_reply(self, stream: int, headers: Mapping[str, str] | None = None) -> bytes:
        return self._control(Kind.SYN_REPLY, struct.pack(">I", stream) + self._headers(headers or {}))

    def reset(self, stream: int, status: int) -> bytes:
        """Return a RST_STREAM; statuses: section 2.6.3 (1 is PROTOCOL_ERROR)."""
        return self._control(Kind.RST_STREAM, struct.pack(">II", stream, status))

    def ping(self, number: int) -> bytes:
        return self._control(Kind.PING, struct.pack(">I", number))

    def _headers(self, headers: Mapping[str, str]) -> bytes:
        parts = [struct.pack(">I", len(headers))]
        for text in (part for pair in headers.items() for part in pair):
            parts.append(struct.pack(">I", len(text.encode())) + text.encode())
        return self._deflate.compress(b"".join(parts)) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    @staticmethod
    def _control(kind: Kind, body: bytes, flags: int = 0) -> bytes:
        return struct.pack(">HHI", 0x8000 | _VERSION, kind, flags << 24 | len(body)) + body
