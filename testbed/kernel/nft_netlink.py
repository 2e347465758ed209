"""Small nftables transactions sent to the kernel directly, where starting nft(8) would take most of the time.

nft reads every chain and set of the namespace before it adds a rule: with 5,000 Services 30 to 50 ms for a change that
the kernel carries out in a tenth of it (docs/adr/0006-nft-netlink.md). The commands of such changes are few, and are
encoded here byte for byte as nft 1.0.6 does. Everything else, and everything that the kernel refuses, is nft's.

::

    batch begin ─ chain, rule, set, element messages ─ batch end       all of them take effect, or none
    message: nlmsghdr, nfgenmsg, attributes (length, type, value, padded to 4 bytes; big endian numbers)

Source: linux include/uapi/linux/netfilter/nf_tables.h; libnftnl udata.h; what strace shows of nft.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Final

_NETLINK_NETFILTER: Final = 12
_NFTABLES: Final = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END, _ERROR = 0x10, 0x11, 2
_NEWCHAIN, _DELCHAIN, _NEWRULE, _DELRULE, _NEWSET, _NEWSETELEM, _DELSETELEM = 3, 5, 6, 8, 9, 12, 14
_REQUEST, _ACK, _CREATE, _APPEND = 0x1, 0x4, 0x400, 0x800
_NESTED: Final = 0x8000
_IPV4: Final = socket.AF_INET
_PROTOCOLS: Final = {"tcp": 6, "udp": 17, "sctp": 132}
_GOTO, _DROP = 0xFFFFFFFC, 0  # verdict codes: NFT_GOTO, NF_DROP
_SET_ID: Final = 6

#: An anonymous map from a number to address and port: flags anonymous, constant, map; types as nft numbers them.
_MAP_FLAGS, _INTEGER, _ADDRESS_AND_PORT = 0x1 | 0x2 | 0x8, 4, 7 << 6 | 13
#: How nft is to print it again: byte order of keys (host), of data (none: it has two parts), no merging.
_MAP_USERDATA: Final = bytes.fromhex("000401000000010400000000060400000000")

_ELEMENT = re.compile(r"\{ (.+?)(?: comment \"([^\"]*)\")?(?: : (.+))? \}")
_BALANCE = re.compile(r"meta l4proto (\w+) dnat ip addr \. port to numgen random mod (\d+) map \{ (.+) \}")


class _Unknown(Exception):
    """A command that is not encoded here."""


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _nested(kind: int, *attributes: bytes) -> bytes:
    return _attribute(kind | _NESTED, b"".join(attributes))


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _number(kind: int, number: int) -> bytes:
    return _attribute(kind, struct.pack(">I", number))


def _part(text: str) -> bytes:
    """Return one field of a key: an address, a protocol or a port, padded to 4 bytes."""
    if text in _PROTOCOLS:
        return bytes([_PROTOCOLS[text], 0, 0, 0])
    if text.isdigit():
        return struct.pack(">HH", int(text), 0)
    try:
        return socket.inet_pton(socket.AF_INET, text)
    except OSError:
        raise _Unknown from None


def _verdict(text: str) -> bytes:
    if text == "drop":
        return _nested(2, _number(1, _DROP))
    verb, _, chain = text.partition(" ")
    if verb != "goto":
        raise _Unknown
    return _nested(2, _number(1, _GOTO), _text(2, chain))


def _element(body: str) -> bytes:
    match = _ELEMENT.fullmatch(body)
    if match is None:
        raise _Unknown
    key, comment, value = match.groups()
    attributes = [_nested(1, _attribute(1, b"".join(map(_part, key.split(" . ")))))]
    if value:
        attributes.append(_nested(2, _verdict(value)))
    if comment:
        text = comment.encode() + b"\0"
        attributes.append(_attribute(6, bytes([0, len(text)]) + text))
    return _nested(1, *attributes)


def _expression(name: str, *attributes: bytes) -> bytes:
    return _nested(1, _text(1, name), _nested(2, *attributes))


def _balancing(rule: str, table: bytes, chain: str, set_id: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield what makes a rule that sends each new connection to one of some endpoints: a map, its elements, the rule."""
    match = _BALANCE.fullmatch(rule)
    if match is None or match[1] not in _PROTOCOLS:
        raise _Unknown
    name, size, elements = _text(2, "__map%d"), int(match[2]), []
    for choice in match[3].split(" , "):
        number, _, target = choice.partition(" : ")
        key, data = struct.pack("=I", int(number)), b"".join(map(_part, target.split(" . ")))
        elements.append(_nested(1, _nested(1, _attribute(1, key)), _nested(2, _attribute(1, data))))
    kinds = (
        _number(3, _MAP_FLAGS) + _number(4, _INTEGER) + _number(5, 4) + _number(6, _ADDRESS_AND_PORT) + _number(7, 8)
    )
    made = _number(10, set_id) + _nested(9, _number(1, size)) + _attribute(13, _MAP_USERDATA)
    yield _NEWSET, _CREATE, table + name + kinds + made
    yield _NEWSETELEM, _CREATE, table + name + _number(4, set_id) + _nested(3, *elements)
    protocol = _attribute(1, bytes([_PROTOCOLS[match[1]]]))
    yield (
        _NEWRULE,
        _CREATE | _APPEND,
        table
        + _text(2, chain)
        + _nested(
            4,
            _expression("meta", _number(2, 16), _number(1, 1)),  # l4proto -> register 1
            _expression("cmp", _number(1, 1), _number(2, 0), _nested(3, protocol)),
            _expression("numgen", _number(1, 1), _number(2, size), _number(3, 1), _number(4, 0)),  # random
            _expression("lookup", _number(2, 1), _number(3, 1), _text(1, "__map%d"), _number(4, set_id)),
            _expression("nat", _number(1, 1), _number(2, _IPV4), _number(3, 1), _number(5, 9)),  # address, port
        ),
    )


def _messages(command: str, set_ids: Iterator[int]) -> Iterator[tuple[int, int, bytes]]:
    """Yield type, flags beside NLM_F_REQUEST, and attributes of what one command is made of."""
    words = command.split(" ", 5)
    verb, kind, family, table_name, name = [*words, "", ""][:5]
    if family != "ip":
        raise _Unknown
    body, table = words[5] if len(words) > 5 else "", _text(1, table_name)
    match verb, kind, bool(body):
        case "add", "chain", False:
            yield _NEWCHAIN, _CREATE, table + _text(3, name)
        case "flush", "chain", False:
            yield _DELRULE, 0, table + _text(2, name)
        case "delete", "chain", False:
            yield _DELCHAIN, 0, table + _text(3, name)
        case "add", "element", True:
            yield _NEWSETELEM, _CREATE, table + _text(2, name) + _nested(3, _element(body))
        case "delete", "element", True:
            yield _DELSETELEM, 0, table + _text(2, name) + _nested(3, _element(body))
        case "add", "rule", True:
            yield from _balancing(body, table, name, next(set_ids))
        case _:
            raise _Unknown


def encode(commands: Sequence[str]) -> bytes | None:
    """Return the netlink messages of a transaction, None when one of its commands is not among those known here.

    Known: adding, emptying and deleting chains without a hook; adding and deleting elements; adding the rule that spreads
    connections over endpoints.
    """
    set_ids = count(_SET_ID)
    try:
        found = [message for command in commands for message in _messages(command, set_ids)]
    except _Unknown:
        return None
    if not found:
        return None
    batch = [_message(_BATCH_BEGIN, _REQUEST, 0, socket.AF_UNSPEC, _NFTABLES, b"")]
    for sequence, (kind, flags, attributes) in enumerate(found, start=1):
        # the last one is acknowledged, which says that all were carried out
        flags |= _REQUEST | (_ACK if sequence == len(found) else 0)
        batch.append(_message(_NFTABLES << 8 | kind, flags, sequence, _IPV4, 0, attributes))
    batch.append(_message(_BATCH_END, _REQUEST, len(found) + 1, socket.AF_UNSPEC, _NFTABLES, b""))
    return b"".join(batch)


def _message(kind: int, flags: int, sequence: int, family: int, resource: int, attributes: bytes) -> bytes:
    general = struct.pack(">BBH", family, 0, resource)
    return struct.pack("=IHHII", 20 + len(attributes), kind, flags, sequence, 0) + general + attributes


def send(batch: bytes) -> bool:
    """Send an encoded transaction to the network namespace of this process; say whether it was carried out.

    If not, nothing of it was: the kernel refused something, or cannot be reached this way.
    """
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
            netlink.bind((0, 0))
            if netlink.send(batch) != len(batch):
                return False
            # The kernel works while we send; what it has to say is there already.
            answer = netlink.recv(65536, socket.MSG_DONTWAIT)
    except OSError:
        return False
    at, errors = 0, []
    while at + 20 <= len(answer):
        length, kind = struct.unpack_from("=IH", answer, at)
        if kind == _ERROR:
            errors.append(struct.unpack_from("=i", answer, at + 16)[0])
        at += max(16, (length + 3) & ~3)
    return errors == [0]
