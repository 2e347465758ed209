"""The ipsets of kube-proxy in the network namespace this process is in.

Members are added and deleted by netlink, in batches of messages that pyroute2 encodes (`pyroute2.IPSet` itself sends one at
a time). What is done once, or needs all members, is left to ipset(8): its ``save`` is what people compare.

Source: linux/netfilter/ipset/ip_set.h.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from testbed.dataplane.ipvs import Member, render_sets
from testbed.dataplane.ipvs_rules import SETS
from testbed.errors import CommandError
from testbed.kernel.netlink import NetlinkSocket, Request
from testbed.kernel.pyroute2_messages import Shape
from testbed.kernel.runner import Runner

NETLINK_NETFILTER: Final = 12
_SUBSYSTEM: Final = 6  # NFNL_SUBSYS_IPSET
_ADD, _DELETE = 9, 10
_PROTOCOL_VERSION: Final = 6
_PROTOCOLS: Final = {"tcp": 6, "udp": 17, "sctp": 132}
#: ip_set.h, enum ipset_errno, and what the types add to it.
_REASONS: Final = {
    4097: "this kernel speaks another version of the ipset protocol",
    4103: "it is there already, or not there",
    4104: "a set cannot hold a network of this size",
    4352: "the set is full",
}
_ADDRESS, _PORT, _SECOND = b"\xfe\xed\xfa\xce", b"\xbe\xef", b"\xfa\xce\xfe\xed"


def open_ipset(where: str) -> NetlinkSocket:
    """Return the socket for `add_member` and `delete_member`."""
    return NetlinkSocket(where, NETLINK_NETFILTER, _REASONS)


def add_member(member: Member) -> Request:
    """Put a member into a set; succeeds when it is there already."""
    return _change(_ADD, member, "add")


def delete_member(member: Member) -> Request:
    """Take a member out of a set; succeeds when it is gone already."""
    return _change(_DELETE, member, "delete")


def _change(command: int, member: Member, verb: str) -> Request:
    name, entry = member
    first, _, rest = entry.partition(",")
    kind = SETS[name]
    if kind == "bitmap:port":
        body = _shape(command, name).fill(struct.pack(">H", int(first)))
    elif kind == "hash:ip":
        body = _shape(command, name).fill(socket.inet_aton(first))
    else:
        where, _, last = rest.partition(",")
        protocol, _, port = where.partition(":")
        address, _, length = last.partition("/")
        values = [socket.inet_aton(first), struct.pack(">H", int(port))]
        values += [socket.inet_aton(address)] if address else []
        body = _shape(command, name, protocol, int(length or 32)).fill(*values)
    return Request(_SUBSYSTEM << 8 | command, 0, body, f"{verb} {entry} {'to' if verb == 'add' else 'from'} set {name}")


@lru_cache(maxsize=512)
def _shape(command: int, name: str, protocol: str = "", length: int = 32) -> Shape:
    """Return the message about a member of a set, whose protocol and prefix length are part of its shape."""
    from pyroute2.netlink.nfnetlink.ipset import ipset_msg

    address = {"attrs": [["IPSET_ATTR_IPADDR_IPV4", socket.inet_ntoa(_ADDRESS)]]}
    second = {"attrs": [["IPSET_ATTR_IPADDR_IPV4", socket.inet_ntoa(_SECOND)]]}
    port = ["IPSET_ATTR_PORT", int.from_bytes(_PORT, "big")]
    kind = SETS[name]
    if kind == "bitmap:port":
        entry, markers = [port], [_PORT]
    elif kind == "hash:ip":
        entry, markers = [["IPSET_ATTR_IP", address]], [_ADDRESS]
    else:
        entry = [["IPSET_ATTR_IP", address], port, ["IPSET_ATTR_PROTO", _PROTOCOLS[protocol]]]
        markers = [_ADDRESS, _PORT]
        if kind != "hash:ip,port":
            entry.append(["IPSET_ATTR_IP2", second])
            markers.append(_SECOND)
        if kind == "hash:ip,port,net":
            entry.append(["IPSET_ATTR_CIDR2", length])
    message = ipset_msg()
    message["nfgen_family"] = socket.AF_INET
    message["attrs"] = [
        ["IPSET_ATTR_PROTOCOL", _PROTOCOL_VERSION],
        ["IPSET_ATTR_SETNAME", name],
        ["IPSET_ATTR_DATA", {"attrs": entry}],
    ]
    return Shape(message, _SUBSYSTEM << 8 | command, markers)


def save_sets(runner: Runner) -> tuple[dict[str, str], set[Member]]:
    """Return kube-proxy's sets that are there, with their types, and all their members.

    Raises:
        CommandError: ipset failed.
        MissingFeature: it is not installed.
    """
    return parse_save(runner.run(["ipset", "save"]))


def parse_save(text: str) -> tuple[dict[str, str], set[Member]]:
    """Read the output of ``ipset save``; sets of others are left out.

    Sample::

        create KUBE-CLUSTER-IP hash:ip,port family inet hashsize 1024 maxelem 65536 bucketsize 12 initval 0x1b7a
        add KUBE-CLUSTER-IP 10.96.1.10,tcp:80
    """
    kinds: dict[str, str] = {}
    members: set[Member] = set()
    for line in text.splitlines():
        verb, name, rest = [*line.split(" ", 2), "", ""][:3]
        if name not in SETS:
            continue
        if verb == "create":
            kinds[name] = rest.split(" ", 1)[0]
        else:
            members.add((name, rest.strip()))
    return kinds, members


def create_sets(runner: Runner, there: Sequence[str]) -> None:
    """Make those of kube-proxy's sets that are not there.

    Raises:
        CommandError: ipset or the kernel refused.
        MissingFeature: it is not installed.
    """
    lines = [line for line in render_sets([]) if line.split(" ", 2)[1] not in there]
    if lines:
        runner.run(["ipset", "-exist", "restore"], stdin="".join(f"{line}\n" for line in lines))


def destroy_sets(runner: Runner) -> list[str]:
    """Remove kube-proxy's sets, as far as no rule looks into them, and return those that stay."""
    left = []
    for name in save_sets(runner)[0]:
        try:
            runner.run(["ipset", "destroy", name])
        except CommandError:
            left.append(name)
    return left
