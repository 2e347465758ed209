"""Pools of addresses: what an Eip's ``address`` means, and which pool and address a Service gets.

Source: openelb v0.6 pkg/util/iprange, pkg/controllers/ipam/ipam.go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from testbed.controllers.openelb.names import BGP, IS_DEFAULT, LAYER2, VIP
from testbed.errors import InputError
from testbed.model.objects import Object, is_terminating, name_of

Address = IPv4Address | IPv6Address


class NotAllocated(InputError):
    """No address for this Service; the message is OpenELB's, as its events show it."""


@dataclass(frozen=True, slots=True)
class AddressRange:
    """Addresses of one family, from ``first`` to ``last``, both among them."""

    first: Address
    last: Address

    @property
    def size(self) -> int:
        return int(self.last) - int(self.first) + 1

    def __contains__(self, address: Address) -> bool:
        return address.version == self.first.version and int(self.first) <= int(address) <= int(self.last)

    def overlaps(self, other: AddressRange) -> bool:
        return (
            self.first.version == other.first.version
            and int(self.first) <= int(other.last)
            and int(other.first) <= int(self.last)
        )

    def at(self, offset: int) -> Address:
        return type(self.first)(int(self.first) + offset)


def parse_range(text: str) -> AddressRange:
    """Return what an Eip's ``address`` means: one address, ``IP/len`` from its network address on, or ``IP-IP``.

    A CIDR's network and broadcast addresses are part of it: OpenELB hands them out.

    Raises:
        ValueError: it is none of these, or ends before it begins.
    """
    text = text.strip().lower()
    begin, dash, end = text.partition("-")
    if dash:
        first, last = ip_address(begin.strip()), ip_address(end.strip())
    elif "/" in text:
        if not re.fullmatch(r"[^/]+/[0-9]{1,3}", text):  # IP/255.255.255.0
            raise ValueError(f"{text!r} is not an address and a prefix length")
        network = ip_network(text, strict=False)
        first, last = network.network_address, network.broadcast_address
    else:
        first = last = ip_address(text)
    if first.version != last.version or int(last) < int(first):
        raise ValueError(f"{text!r} ends before it begins")
    return AddressRange(first, last)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """An Eip. ``used``: address -> the Services (NAMESPACE/NAME) that share it, as its status has it."""

    name: str
    address: str  # as written
    range: AddressRange
    protocol: str = BGP
    interface: str = ""
    is_disabled: bool = False
    is_deleting: bool = False
    is_default: bool = False
    priority: int = 0
    namespaces: tuple[str, ...] = ()
    namespace_selector: Mapping[str, str] | None = None
    used: Mapping[str, tuple[str, ...]]

    @property
    def is_occupied(self) -> bool:
        return len(self.used) >= self.range.size

    def address_of(self, service: str) -> str:
        """Return the address that a Service has here, or ''."""
        return next((address for address, services in self.used.items() if service in services), "")

    def serves(self, namespace: str, labels: Mapping[str, str]) -> bool:
        """Say whether Services of a namespace may be given this pool without naming it."""
        if namespace in self.namespaces:
            return True
        selector = self.namespace_selector
        return bool(selector) and all(labels.get(key) == value for key, value in (selector or {}).items())

    def refuse_unusable(self) -> None:
        """Raise NotAllocated when this pool gives no new addresses."""
        if self.is_deleting:
            raise NotAllocated(f"eip:{self.name} is deleting")
        if self.is_disabled:
            raise NotAllocated(f"eip:{self.name} is disabled")


def parse_pool(eip: Object) -> Pool | None:
    """Return an Eip as a pool; None for one whose address makes no sense (made while no webhook was there)."""
    spec, status = eip.get("spec") or {}, eip.get("status") or {}
    address = str(spec.get("address") or "")
    try:
        parsed = parse_range(address)
    except ValueError:
        return None
    protocol = spec.get("protocol")
    return Pool(
        name=name_of(eip),
        address=address,
        range=parsed,
        protocol=protocol if protocol in (LAYER2, VIP) else BGP,
        interface=str(spec.get("interface") or ""),
        is_disabled=bool(spec.get("disable")),
        is_deleting=is_terminating(eip),
        is_default=is_default(eip),
        priority=int(spec.get("priority") or 0),
        namespaces=tuple(spec.get("namespaces") or ()),
        namespace_selector=spec.get("namespaceSelector"),
        used={ip: tuple(filter(None, names.split(";"))) for ip, names in (status.get("used") or {}).items()},
    )


def is_default(eip: Object) -> bool:
    """Say whether an Eip is annotated as the default one."""
    return (eip["metadata"].get("annotations") or {}).get(IS_DEFAULT) == "true"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a Service asks for: a pool by name, an address, both, or neither ('')."""

    service: str  # NAMESPACE/NAME
    pool: str = ""
    address: str = ""
    families: tuple[str, ...] = ("IPv4",)


def choose_pool(wish: Wish, pools: Sequence[Pool], namespace: str, labels: Mapping[str, str]) -> str:
    """Return the name of the pool that a Service gets its address from; a pool that it names need not be there.

    Raises:
        NotAllocated: there is none.
    """
    if wish.pool:
        return wish.pool
    if wish.address:
        address = _parsed(wish.address)
        for pool in pools:
            if address is not None and address in pool.range:
                pool.refuse_unusable()
                return pool.name
        raise NotAllocated(f"no available eip was found containing the ip:[{wish.address}]")
    usable = [pool for pool in pools if not pool.is_deleting and not pool.is_disabled]
    bound = [pool for pool in usable if pool.serves(namespace, labels)]
    if bound:
        return min(bound, key=lambda pool: (pool.is_occupied, pool.priority)).name
    for pool in usable:
        if pool.is_default:
            return pool.name
    raise NotAllocated("no available default eip found")


def allocate_address(wish: Wish, pool: Pool) -> tuple[str, Pool]:
    """Return the address that a Service gets in a pool, and the pool with that address taken.

    A fixed address is given even if others have it: they share it. Otherwise it is the lowest that nobody has.

    Raises:
        NotAllocated: with the event's text.
    """
    family = f"IPv{pool.range.first.version}"
    if family not in wish.families:
        raise NotAllocated("service can't use different family eip")
    try:
        pool.refuse_unusable()
        address = _suitable(wish, pool)
    except NotAllocated as error:
        raise NotAllocated(f"no avliable eip, err:{error}") from None  # sic
    services = pool.used.get(address, ())
    used = {**pool.used, address: services if wish.service in services else (*services, wish.service)}
    return address, replace(pool, used=used)


def _suitable(wish: Wish, pool: Pool) -> str:
    if wish.address:
        address = _parsed(wish.address)
        # Upstream takes what is no address at all for none asked for, and gives out any; here it is outside the range.
        if address is None or address not in pool.range:
            raise NotAllocated(
                f"the specified ip:{wish.address} is beyond the range of eip[{pool.name}:{pool.address}]"
            )
        return str(address)
    for offset in range(min(pool.range.size, len(pool.used) + 1)):
        address_text = str(pool.range.at(offset))
        if address_text not in pool.used:
            return address_text
    raise NotAllocated("no suitable ip to allocate")


def release_address(service: str, pool: Pool) -> Pool:
    """Return the pool without a Service."""
    used = {}
    for address, services in pool.used.items():
        remaining = tuple(one for one in services if one != service)
        if remaining:
            used[address] = remaining
    return replace(pool, used=used)


def keep_services(pool: Pool, services: Iterable[str]) -> Pool:
    """Return the pool with only these Services in it: what is left of deleted ones is dropped."""
    known = set(services)
    kept = {address: tuple(one for one in names if one in known) for address, names in pool.used.items()}
    return replace(pool, used={address: names for address, names in kept.items() if names})


def status_of(pool: Pool) -> Object:
    """Return a pool as an Eip's status; zero values are left out, as Go's omitempty does."""
    status: Object = {
        "firstIP": str(pool.range.first),
        "lastIP": str(pool.range.last),
        "poolSize": pool.range.size,
        "v4": pool.range.first.version == 4,
        "used": {address: ";".join(names) for address, names in sorted(pool.used.items(), key=_by_address)},
        "usage": len(pool.used),
        "occupied": pool.is_occupied,
    }
    return {key: value for key, value in status.items() if value}


def _by_address(item: tuple[str, tuple[str, ...]]) -> tuple[int, int]:
    address = ip_address(item[0])
    return address.version, int(address)


def _parsed(text: str) -> Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None
