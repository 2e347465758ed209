"""What becomes of one ARP frame: decided on bytes, so that a thousand of them a second cost little. Pure.

::

    0        6        12     14    16    18 19 20   22          28         32          38         42
    | dst MAC| src MAC| 0806 |  1  | 0800|6 |4 | op | sender MAC | sender IP| target MAC | target IP|

Source: RFC 826, RFC 5227 (address conflict detection).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

FRAME_BYTES = 42
BROADCAST = b"\xff" * 6
_ETHERNET_IPV4 = bytes.fromhex("0001080006" + "04")  # hardware type 1, protocol 0800, lengths 6 and 4
_REQUEST, _REPLY = b"\x00\x01", b"\x00\x02"
_NO_MAC = b"\0" * 6


class Fate(Enum):
    """What a frame is; the values are the ``reason`` of metric arp_frames_ignored."""

    ANSWERED = "answered"
    OTHER_ADDRESS = "other address"  # a request for, or an answer about, what is not announced here
    MALFORMED = "malformed"  # too short, or not about Ethernet and IPv4, or no such operation
    SPOOFED = "spoofed"  # its senders contradict each other, or are none that a host could have
    FOREIGN = "foreign"  # somebody else says that he has an address that is announced here


@dataclass(frozen=True, slots=True)
class AddressFrames:
    """The frames of one announced address, built by scapy: see `testbed.programs.openelb.frames`.

    Attributes:
        reply: an answer in which the requester's MAC (twice) and IP are to be filled in.
        gratuitous: what is sent once when the address is taken over: a request and a reply.
        probe: an ARP probe (sender 0.0.0.0), to find out who else answers.
    """

    reply: bytes
    gratuitous: tuple[bytes, bytes]
    probe: bytes


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a frame is, which address it is about ('' when that is none of ours), and what to send back."""

    fate: Fate
    address: bytes = b""
    reply: bytes = b""
    sender: bytes = b""  # MAC


_MALFORMED = Judgement(Fate.MALFORMED)
_SPOOFED = Judgement(Fate.SPOOFED)
_OTHER = Judgement(Fate.OTHER_ADDRESS)


def judge_frame(frame: bytes, table: Mapping[bytes, AddressFrames], own_mac: bytes) -> Judgement:
    """Return what becomes of an ARP frame (from the Ethernet header on) that has arrived.

    Requests are answered whoever sends them and to whomever: also probes, whose sender has no address yet.

    Args:
        table: announced addresses, four bytes each.
        own_mac: of the link it arrived on.
    """
    if len(frame) < FRAME_BYTES or frame[12:14] != b"\x08\x06" or frame[14:20] != _ETHERNET_IPV4:
        return _MALFORMED
    operation = frame[20:22]
    if operation not in (_REQUEST, _REPLY):
        return _MALFORMED
    source, sender, sender_ip, target_ip = frame[6:12], frame[22:28], frame[28:32], frame[38:42]
    if source != sender or sender[0] & 1 or sender == _NO_MAC or sender_ip[0] == 127 or sender_ip[0] >= 224:
        return _SPOOFED
    if sender_ip in table:
        return _OTHER if sender == own_mac else Judgement(Fate.FOREIGN, sender_ip, sender=sender)
    if operation == _REPLY:
        return _OTHER
    frames = table.get(target_ip)
    if frames is None:
        return _OTHER
    template = frames.reply
    reply = sender + template[6:32] + sender + sender_ip + template[42:]
    return Judgement(Fate.ANSWERED, target_ip, reply, sender)
