"""Everything of ipvs mode in the network namespace this process is in, but for iptables rules: lists it, and applies changes."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from types import TracebackType
from typing import Final

from testbed.dataplane.ipvs import Change, IpvsObjects, RealServer
from testbed.dataplane.ipvs_rules import DEVICE, SETS
from testbed.errors import KernelError, MissingFeature
from testbed.kernel.ipset import add_member, create_sets, delete_member, destroy_sets, open_ipset, save_sets
from testbed.kernel.ipvs import Ipvs
from testbed.kernel.netlink import NetlinkSocket, Request
from testbed.kernel.rtnetlink import RtnetlinkSocket, add_bound_address, add_link, delete_address, delete_link
from testbed.kernel.runner import Runner
from testbed.kernel.sysctl import apply_sysctls, read_sysctl

_NO_SUCH_KIND: Final = "EOPNOTSUPP"


@dataclass(frozen=True, slots=True)
class Listing:
    """What is there: objects, and whether what holds them is."""

    objects: IpvsObjects = field(default_factory=IpvsObjects)
    has_device: bool = False
    sets: Mapping[str, str] = field(default_factory=dict)  # with their types
    local_addresses: frozenset[IPv4Address] = frozenset()  # of other links

    @property
    def missing(self) -> str:
        """Say in a few words what there is no place for, or ''."""
        if not self.has_device:
            return f"the link {DEVICE} is gone"
        gone = [name for name in SETS if name not in self.sets]
        return f"the set {gone[0]} is gone" + (f", and {len(gone) - 1} more" if len(gone) > 1 else "") if gone else ""


Refused = list[tuple[object, str]]
"""Addresses, virtual servers and set members that the kernel did not take, each with the reason."""


class IpvsNode:
    """IPVS, kube-ipvs0 and the sets of one node.

    Args:
        runner: Runs ipset(8) in the namespace that this process is in.
        where: Names the node in error messages.
        device_kind: The kind of link that holds addresses; tests without dummy links take a bridge, which is down as well.

    Raises:
        MissingFeature: the kernel has no IPVS.
    """

    def __init__(self, runner: Runner, where: str, *, device_kind: str = "dummy") -> None:
        self._runner = runner
        self._where = where
        self._ipvs = Ipvs(where)
        self._links = RtnetlinkSocket(where)
        self._sets = open_ipset(where)
        self._device = BoundAddresses(self._links, device_kind)

    def __enter__(self) -> IpvsNode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for one in (self._ipvs, self._links, self._sets):
            one.close()

    def probe(self, scheduler: str) -> None:
        """Return when everything that ipvs mode needs is there.

        Raises:
            MissingFeature: names what is missing.
        """
        self._runner.run(["ipset", "--version"])
        self._ipvs.probe_scheduler(scheduler)

    def list(self) -> Listing:
        """Return what is there.

        Raises:
            KernelError: it cannot be read.
        """
        kinds, members = save_sets(self._runner)
        bound, others = self._device.find()
        objects = IpvsObjects(frozenset(bound or ()), self._ipvs.list_servers(), frozenset(members))
        return Listing(objects, bound is not None, kinds, others)

    def local_addresses(self) -> frozenset[IPv4Address]:
        """Return the addresses of every link but kube-ipvs0."""
        return self._device.find()[1]

    def ensure(self, sysctls: Mapping[str, str], listing: Listing) -> None:
        """Have the link, the sets and the settings.

        Raises:
            KernelError: the kernel refused.
        """
        self._device.ensure()
        create_sets(self._runner, list(listing.sets))
        apply_sysctls({f"net/ipv4/{name}": value for name, value in sysctls.items()}, self._where)

    def find_wrong_setting(self, sysctls: Mapping[str, str]) -> str:
        """Return in a few words which setting is not as it was set, or ''."""
        for name, value in sysctls.items():
            found = read_sysctl(f"net/ipv4/{name}")
            if found != value:
                return f"net.ipv4.{name.replace('/', '.')} is {found or 'gone'} instead of {value}"
        return ""

    def set_timeouts(self, tcp_s: int, tcp_fin_s: int, udp_s: int) -> None:
        """Set IPVS's timeouts; 0 leaves one as it is."""
        if tcp_s > 0 or tcp_fin_s > 0 or udp_s > 0:
            self._ipvs.set_timeouts(tcp_s, tcp_fin_s, udp_s)

    def count_connections(self, servers: Collection[RealServer]) -> dict[RealServer, int]:
        """Return the connections of those of the real servers that are there."""
        counted = {key: self._ipvs.count_connections(key) for key in {key for key, _ in servers}}
        return {(key, real): counted[key][real] for key, real in servers if real in counted[key]}

    # -- changes ---------------------------------------------------------------------------------------------------

    def add(self, change: Change) -> Refused:
        """Carry out what a change adds or alters, real servers that go included. Rules about the members come next."""
        refused = _send(self._links, self._device.binds(change.bind))
        ipvs = self._ipvs
        servers: list[tuple[object, Request]] = [(key, ipvs.add_server(key, how)) for key, how in change.add_servers]
        servers += [(key, ipvs.set_server(key, how)) for key, how in change.set_servers]
        for key, real in change.renew_real:
            servers += [(key, ipvs.delete_real(key, real)), (key, ipvs.add_real(key, real))]
        servers += [(key, ipvs.add_real(key, real)) for key, real in change.add_real]
        servers += [(key, ipvs.set_real(key, real, weight)) for key, real, weight in change.set_real]
        servers += [(key, ipvs.delete_real(key, real)) for key, real in change.delete_real]
        refused += _send(ipvs.netlink, servers)
        return refused + _send(self._sets, [(member, add_member(member)) for member in change.add_members])

    def remove(self, change: Change) -> Refused:
        """Carry out the rest of a change."""
        refused = _send(self._ipvs.netlink, [(key, self._ipvs.delete_server(key)) for key in change.delete_servers])
        refused += _send(self._sets, [(member, delete_member(member)) for member in change.delete_members])
        return refused + _send(self._links, self._device.unbinds(change.unbind))


def clean_up_ipvs(runner: Runner, where: str) -> bool:
    """Remove virtual servers, kube-ipvs0 and the sets, as ``kube-proxy --cleanup`` does; say whether sets had to stay.

    A kernel without IPVS has nothing to remove.

    Raises:
        KernelError: the kernel refused.
    """
    with RtnetlinkSocket(where) as links:
        links.send([delete_link(DEVICE)])
    with contextlib.suppress(MissingFeature), Ipvs(where) as ipvs:
        ipvs.flush()
    with contextlib.suppress(MissingFeature):
        return bool(destroy_sets(runner))
    return False


class BoundAddresses:
    """The link kube-ipvs0, which is never up: its addresses are local to the node, and no packet leaves by it."""

    def __init__(self, links: RtnetlinkSocket, kind: str = "dummy") -> None:
        self._links = links
        self._kind = kind
        self._index = 0

    def ensure(self) -> None:
        """Have the link.

        Raises:
            MissingFeature: the kernel has no links of this kind.
        """
        try:
            self._links.send([add_link(DEVICE, self._kind)])
        except KernelError as error:
            if _NO_SUCH_KIND in str(error):
                raise MissingFeature(
                    f"the kernel has no {self._kind} links, which hold the Services' addresses: `modprobe {self._kind}`"
                ) from error
            raise
        self._look()

    def _look(self) -> int:
        self._index = next((link.index for link in self._links.list_links() if link.name == DEVICE), 0)
        return self._index

    def find(self) -> tuple[set[str] | None, frozenset[IPv4Address]]:
        """Return the addresses that are bound (None: there is no link), and those of all other links."""
        index = self._look()
        bound: set[str] = set()
        others: set[IPv4Address] = set()
        for link, address in self._links.list_addresses():
            if link == index:
                bound.add(str(address.ip))
            else:
                others.add(address.ip)
        return bound if index else None, frozenset(others)

    def binds(self, addresses: Iterable[str]) -> Sequence[tuple[object, Request]]:
        return [(address, add_bound_address(self._index, address)) for address in addresses]

    def unbinds(self, addresses: Iterable[str]) -> Sequence[tuple[object, Request]]:
        return [(address, delete_address(self._index, address)) for address in addresses]


def _send(netlink: NetlinkSocket, requests: Sequence[tuple[object, Request]]) -> Refused:
    """Send requests that are about things, and return what was refused."""
    refusals = netlink.try_send([request for _, request in requests])
    return [(requests[r.index][0], f"could not {requests[r.index][1].what}: {r.reason}") for r in refusals]
