"""A netlink socket that sends many requests in one go, and says which of them were refused.

The kernel carries out every request of a batch even when one fails, so callers order them by dependency and decide what a
refusal means. Families that use it: rtnetlink (`testbed.kernel.rtnetlink`), IPVS's generic netlink (`testbed.kernel.ipvs`),
ipset's netfilter netlink (`testbed.kernel.ipset`).

Sources: netlink(7), linux/netlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from testbed.errors import KernelError

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_DUMP_INTR = 0x10
_SOL_NETLINK, _NETLINK_EXT_ACK, _NETLINK_CAP_ACK = 270, 11, 10
_NLM_F_CAPPED, _NLM_F_ACK_TLVS, _NLMSGERR_ATTR_MSG = 0x100, 0x200, 1
_TYPE_MASK = 0x3FFF
#: Acknowledgements of so many requests fit into the smallest receive buffer (net.core.rmem_default 212,992).
_AT_ONCE: Final = 150
_TIMEOUT_S: Final = 30.0
_DUMP_TRIES: Final = 5


@dataclass(frozen=True, slots=True)
class Request:
    """One netlink message without its header, and the words for an error message about it."""

    kind: int
    flags: int
    body: bytes
    what: str
    ignore: frozenset[int] = frozenset()  # errno values that mean "already so"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request of a batch that the kernel did not carry out: which one (from 0), errno, and the reason in words."""

    index: int
    number: int
    reason: str


class NetlinkSocket:
    """A netlink socket that works on the namespace it was opened in, wherever the process has moved since.

    Args:
        where: Names the namespace in error messages.
        protocol: NETLINK_ROUTE and so on.
        reasons: Words for errno values of this family's own.
    """

    def __init__(
        self, where: str, protocol: int = socket.NETLINK_ROUTE, reasons: Mapping[int, str] | None = None
    ) -> None:
        self.where = where
        self._reasons = reasons or {}
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        self._socket.settimeout(_TIMEOUT_S)
        for option in (_NETLINK_EXT_ACK, _NETLINK_CAP_ACK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> NetlinkSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, requests: Sequence[Request]) -> None:
        """Have every request carried out, in order.

        Raises:
            KernelError: the first one that was refused, with the kernel's reason. Later ones were tried all the same.
        """
        refused = self.try_send(requests)
        if refused:
            raise self.error(requests, refused[0])

    def error(self, requests: Sequence[Request], refusal: Refusal) -> KernelError:
        """Return the error that tells of one refusal."""
        number = errno.errorcode.get(refusal.number, str(refusal.number))
        return KernelError(f"{self.where}: could not {requests[refusal.index].what}: {refusal.reason} ({number})")

    def try_send(self, requests: Sequence[Request]) -> list[Refusal]:
        """Have every request carried out, in order, and return those that were refused."""
        refused: list[Refusal] = []
        for start in range(0, len(requests), _AT_ONCE):
            refused += self._send_some(requests[start : start + _AT_ONCE], start)
        return refused

    def _send_some(self, requests: Sequence[Request], offset: int) -> list[Refusal]:
        first = self._sequence + 1
        packet = bytearray()
        for request in requests:
            self._sequence += 1
            flags = request.flags | NLM_F_REQUEST | NLM_F_ACK
            packet += struct.pack("=IHHII", 16 + len(request.body), request.kind, flags, self._sequence, 0)
            packet += request.body + b"\0" * (-len(request.body) % 4)
        self._socket.sendto(packet, (0, 0))
        refused: list[Refusal] = []
        waiting = len(requests)
        while waiting:
            for kind, flags, sequence, body in self._receive():
                if kind != _NLMSG_ERROR or not first <= sequence < first + len(requests):
                    continue
                waiting -= 1
                number = -struct.unpack_from("=i", body)[0]
                if number and number not in requests[sequence - first].ignore:
                    reason = _reason(body, flags) or self._reasons.get(number) or os.strerror(number)
                    refused.append(Refusal(offset + sequence - first, number, reason))
        return refused

    def dump(self, kind: int, body: bytes, what: str) -> list[bytes]:
        """Return the bodies of all messages that answer a request for everything of a kind.

        A dump that changes broke off is asked for again.

        Raises:
            KernelError: the kernel refused, or things never stood still.
        """
        for _ in range(_DUMP_TRIES):
            self._sequence += 1
            header = struct.pack("=IHHII", 16 + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, self._sequence, 0)
            self._socket.sendto(header + body, (0, 0))
            found, interrupted = self._collect(what)
            if not interrupted:
                return found
        raise KernelError(f"{self.where}: could not {what}: it changed each time while it was read")

    def _collect(self, what: str) -> tuple[list[bytes], bool]:
        found: list[bytes] = []
        interrupted = False
        while True:
            for kind, flags, sequence, body in self._receive():
                if sequence != self._sequence:
                    continue
                interrupted = interrupted or bool(flags & _NLM_F_DUMP_INTR)
                number = -struct.unpack_from("=i", body)[0] if kind in (_NLMSG_ERROR, _NLMSG_DONE) and body else 0
                if number > 0:
                    reason = self._reasons.get(number) or os.strerror(number)
                    raise KernelError(f"{self.where}: could not {what}: {reason}")
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    return found, interrupted
                found.append(body)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        return messages(self._socket.recv(1 << 18))


def messages(packet: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield type, flags, sequence number and body of each message of a packet."""
    offset = 0
    while offset < len(packet):
        length, kind, flags, sequence, _port = struct.unpack_from("=IHHII", packet, offset)
        yield kind, flags, sequence, packet[offset + 16 : offset + length]
        offset += (length + 3) & ~3


def attributes(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each attribute of a message or of a nested attribute."""
    offset = 0
    while offset + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, offset)
        if length < 4:
            return
        yield kind & _TYPE_MASK, body[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def _reason(body: bytes, flags: int) -> str:
    """Return the extended acknowledgement's text, if the kernel gave one (netlink NLMSGERR_ATTR_MSG)."""
    if not flags & _NLM_F_ACK_TLVS:
        return ""
    start = 20  # error number and the header of the request; its body is left out (NETLINK_CAP_ACK)
    if not flags & _NLM_F_CAPPED:
        start = 4 + ((struct.unpack_from("=I", body, 4)[0] + 3) & ~3)
    return dict(attributes(body[start:])).get(_NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode()
