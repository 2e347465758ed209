"""What tests of ipvs mode share: namespaces to enter, what a node holds as text, and a node that exists in memory only."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from pathlib import Path

from testbed.dataplane.ipvs import (
    Balancing,
    Change,
    IpvsObjects,
    Member,
    RealServer,
    Server,
    VirtualServer,
)
from testbed.dataplane.ipvs_rules import DEVICE, SETS
from testbed.kernel import linux
from testbed.kernel.iptables import Backend, Iptables
from testbed.kernel.ipvs_node import IpvsNode, Listing, Refused
from testbed.kernel.runner import SubprocessRunner
from testbed.programs.proxy_ipvs import IpvsProxier

sys.path.append(str(Path(__file__).parent / "golden"))
from compare import differences, parse

LOCAL = frozenset({IPv4Address("127.0.0.1"), IPv4Address("192.168.0.2")})


@contextlib.contextmanager
def network_namespace(pid: int | None = None) -> Iterator[None]:
    """Be in a network namespace: a new one, or that of a process."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if pid is None:
            linux.unshare(linux.CLONE_NEWNET)
        else:
            there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                linux.setns(there, linux.CLONE_NEWNET)
            finally:
                os.close(there)
        yield
    finally:
        linux.setns(home, linux.CLONE_NEWNET)
        os.close(home)


@dataclass
class RealNode:
    """A network namespace with its own kube-proxy in ipvs mode. Use its proxier only while being in that namespace."""

    runner: SubprocessRunner
    node: IpvsNode
    proxier: IpvsProxier

    def run(self, *argv: str, stdin: str = "") -> str:
        return self.runner.run(argv, stdin=stdin)


@contextlib.contextmanager
def real_node(folder: Path, *addresses: str, pid: int | None = None) -> Iterator[RealNode]:
    """Be in a namespace (a new one with these addresses, or a process's), with a proxier for it."""
    with network_namespace(pid):
        runner = SubprocessRunner({"XTABLES_LOCKFILE": str(folder / "lock")})
        if pid is None:
            lines = ["link set lo up", "link add eth0 type dummy", *(f"addr add {a}/24 dev eth0" for a in addresses)]
            runner.run(["ip", "-batch", "-"], stdin="".join(f"{line}\n" for line in [*lines, "link set eth0 up"]))
        with IpvsNode(runner, "node") as node:
            yield RealNode(runner, node, IpvsProxier(node, Iptables(runner, Backend.LEGACY)))


def unlike(one: str, other: str) -> list[str]:
    """Return the differences of two dumps, as ``tests/golden/compare.py`` prints them."""
    return list(differences(parse(one), parse(other)))


def dump(runner: SubprocessRunner) -> str:
    """Return everything that ipvs mode programs, in the form of the golden files."""
    sets = [line.partition(" bucketsize")[0] for line in runner.run(["ipset", "save"]).splitlines()]
    links = runner.run(["ip", "-4", "-o", "addr", "show", "dev", DEVICE]).splitlines()
    names = ("vs/conntrack", "vs/expire_nodest_conn", "vs/expire_quiescent_template", "conf/all/arp_ignore",
             "conf/all/arp_announce", "ip_forward")  # fmt: skip
    saved = runner.run(["iptables-legacy-save"])
    rules = "\n".join(line.rsplit(" [", 1)[0] for line in saved.splitlines() if not line.startswith("#"))
    sections = {
        "ipvsadm -Sn": runner.run(["ipvsadm", "-Sn"]).splitlines(),
        "ipset save": sets,
        DEVICE: [line.split()[3] for line in links],
        "sysctl": [f"{name} = {Path(f'/proc/sys/net/ipv4/{name}').read_text().strip()}" for name in names],
        "iptables": rules.splitlines(),
    }
    return "".join(f"# {title}\n" + "".join(f"{line}\n" for line in lines) for title, lines in sections.items())


@dataclass
class FakeNode:
    """The kernel side of ipvs mode in memory; it refuses what the kernel refuses. `IpvsNode` is its twin."""

    bound: set[str] | None = None
    servers: dict[VirtualServer, tuple[Balancing, dict[str, int]]] = field(default_factory=dict)
    sets: dict[str, str] = field(default_factory=dict)
    members: set[Member] = field(default_factory=set)
    settings: dict[str, str] = field(default_factory=dict)
    local: frozenset[IPv4Address] = LOCAL
    connections: dict[RealServer, int] = field(default_factory=dict)
    timeouts: tuple[int, int, int] = (0, 0, 0)
    #: Things the kernel does not take, whatever the reason.
    broken: set[object] = field(default_factory=set)
    lists: int = 0
    changes: list[Change] = field(default_factory=list)

    def list(self) -> Listing:
        self.lists += 1
        servers = {key: Server(how, dict(real)) for key, (how, real) in self.servers.items()}
        objects = IpvsObjects(frozenset(self.bound or ()), servers, frozenset(self.members))
        return Listing(objects, self.bound is not None, dict(self.sets), self.local)

    def local_addresses(self) -> frozenset[IPv4Address]:
        return self.local

    def ensure(self, sysctls: Mapping[str, str], listing: Listing) -> None:
        self.bound = self.bound if self.bound is not None else set()
        self.sets |= {name: kind for name, kind in SETS.items() if name not in self.sets}
        self.settings |= sysctls

    def find_wrong_setting(self, sysctls: Mapping[str, str]) -> str:
        return next(
            (f"{name} is not {value}" for name, value in sysctls.items() if self.settings.get(name) != value), ""
        )

    def set_timeouts(self, tcp_s: int, tcp_fin_s: int, udp_s: int) -> None:
        self.timeouts = (tcp_s, tcp_fin_s, udp_s)

    def count_connections(self, servers: Collection[RealServer]) -> dict[RealServer, int]:
        there = {(key, real) for key, (_, found) in self.servers.items() for real in found}
        return {one: self.connections.get(one, 0) for one in servers if one in there}

    def add(self, change: Change) -> Refused:
        self.changes.append(change)
        refused: Refused = []
        for address in change.bind:
            if self.bound is None or address in self.broken:
                refused.append((address, f"could not bind address {address}: No such device"))
            else:
                self.bound.add(address)
        for key, how in change.add_servers:
            if key in self.servers or key in self.broken:
                refused.append((key, f"could not add virtual server {key}: it is there already"))
            else:
                self.servers[key] = (how, {})
        for key, how in change.set_servers:
            if key in self.servers:
                self.servers[key] = (how, self.servers[key][1])
            else:
                refused.append((key, f"could not change virtual server {key}: no such virtual server"))
        for key, real in change.renew_real:
            self.servers.get(key, (None, {}))[1].pop(real, None)
        for key, real, weight in (
            *((key, real, 1) for key, real in (*change.renew_real, *change.add_real)), *change.set_real
        ):  # fmt: skip
            known = self.servers.get(key)
            is_new = (key, real, weight) not in change.set_real
            if known is None or (real in known[1]) is is_new:
                refused.append((key, f"could not add real server {real} of {key}"))
            else:
                known[1][real] = weight
        for key, real in change.delete_real:
            self.servers.get(key, (None, {}))[1].pop(real, None)
        for member in change.add_members:
            if member[0] not in self.sets or member in self.broken:
                refused.append((member, f"could not add {member[1]} to set {member[0]}: the set is full"))
            else:
                self.members.add(member)
        return refused

    def remove(self, change: Change) -> Refused:
        for key in change.delete_servers:
            self.servers.pop(key, None)
        self.members -= set(change.delete_members)
        if self.bound is not None:
            self.bound -= set(change.unbind)
        return []

    def close(self) -> None:
        pass

    def flush(self, names: Iterable[str]) -> None:
        """Do what ``ipset flush`` does."""
        gone = set(names)
        self.members = {member for member in self.members if member[0] not in gone}

    def objects(self) -> IpvsObjects:
        return replace(self.list().objects)
