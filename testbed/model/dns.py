"""DNS as values: records, answers, what a zone is set to, and what Services, EndpointSlices and pods say to it.

Sources: Kubernetes DNS-Based Service Discovery 1.1.0; CoreDNS v1.11 plugin/kubernetes/object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Any, Final

from testbed.model.objects import Object, labels_of, name_of, namespace_of
from testbed.model.service import SERVICE_NAME_LABEL

REVERSE_ZONE: Final = "in-addr.arpa"
REVERSE_ZONE_6: Final = "ip6.arpa"
NO_PORT: Final = -1
"""The port of an endpoint without ports: it has an address, and no SRV record."""


class RecordType(IntEnum):
    """Types that the zone has; the values are IANA's."""

    A = 1
    NS = 2
    CNAME = 5
    SOA = 6
    PTR = 12
    TXT = 16
    AAAA = 28
    SRV = 33


class Rcode(IntEnum):
    """How a query ended."""

    NOERROR = 0
    SERVFAIL = 2
    NXDOMAIN = 3
    REFUSED = 5


class PodMode(Enum):
    """For which addresses there are pod records."""

    DISABLED = "disabled"
    INSECURE = "insecure"  # for every address, as long as the namespace exists
    VERIFIED = "verified"  # for those of pods


@dataclass(frozen=True, slots=True)
class Record:
    """One resource record. Names have no final dot. ``value`` by type: address or name as text; SRV: (priority, weight,
    port, target); SOA: (server, mailbox, serial, refresh, retry, expire, minimum)."""

    name: str
    type: RecordType
    ttl: int
    value: str | tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the zone says to a question.

    ``outside`` is a name that others must be asked for: records of it, of the type asked for, complete the answer. With
    ``falls_through`` the whole question is for others, if there are any; the rest of the answer holds when there are none.
    """

    rcode: Rcode = Rcode.NOERROR
    records: tuple[Record, ...] = ()
    additional: tuple[Record, ...] = ()
    authority: tuple[Record, ...] = ()
    outside: str = ""
    falls_through: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoneSettings:
    """What the Corefile's plugin ``kubernetes`` says. ``server`` is the address of this DNS server, for NS records."""

    domain: str = "cluster.local"
    ttl: int = 5
    pods: PodMode = PodMode.DISABLED
    fallthrough: tuple[str, ...] = ()  # zones whose unknown names others are asked for
    server: str = ""


@dataclass(frozen=True, slots=True)
class DnsPort:
    name: str
    protocol: str  # lower case
    number: int


@dataclass(frozen=True, slots=True)
class DnsEndpoint:
    """A ready address of a Service; ``label`` is its first label below the Service's name."""

    address: str
    label: str
    ports: tuple[DnsPort, ...]


@dataclass(frozen=True, slots=True)
class DnsService:
    namespace: str
    name: str
    cluster_ips: tuple[str, ...] = ()  # empty for headless and external ones
    is_headless: bool = False
    external_name: str = ""
    ports: tuple[DnsPort, ...] = ()


def parse_dns_service(obj: Object) -> DnsService:
    spec: Mapping[str, Any] = obj.get("spec") or {}
    namespace, name = namespace_of(obj), name_of(obj)
    if spec.get("type") == "ExternalName":
        target = str(spec.get("externalName") or "").removesuffix(".")
        return DnsService(namespace, name, external_name=target if family_of(target) is None else "")
    given = spec.get("clusterIPs") or [spec.get("clusterIP") or ""]
    ports = tuple(
        DnsPort((port.get("name") or "").lower(), (port.get("protocol") or "TCP").lower(), int(port["port"]))
        for port in spec.get("ports") or ()
    )
    if given[0] == "None":
        return DnsService(namespace, name, is_headless=True, ports=ports)
    return DnsService(
        namespace, name, cluster_ips=tuple(ip for ip in given if family_of(ip) is IPv4Address), ports=ports
    )


def parse_dns_slice(obj: Object) -> tuple[tuple[str, str] | None, tuple[DnsEndpoint, ...]]:
    """Return the Service of a slice and its ready endpoints. A condition that is not given means ready."""
    service = labels_of(obj).get(SERVICE_NAME_LABEL)
    if not service or obj.get("addressType", "IPv4") != "IPv4":
        return None, ()
    ports = tuple(
        DnsPort((port.get("name") or "").lower(), (port.get("protocol") or "TCP").lower(), int(port["port"]))
        for port in obj.get("ports") or ()
        if port.get("port") is not None
    ) or (DnsPort("", "", NO_PORT),)
    endpoints = [
        DnsEndpoint(address, str(raw.get("hostname") or address.replace(".", "-")).lower(), ports)
        for raw in obj.get("endpoints") or ()
        if (raw.get("conditions") or {}).get("ready") is not False
        for address in raw.get("addresses") or ()
        if family_of(address) is IPv4Address
    ]
    return (namespace_of(obj), service), tuple(dict.fromkeys(endpoints))


def parse_dns_pod(obj: Object) -> tuple[str, ...]:
    """Return the addresses of a pod; a pod that has ended has none any more."""
    status = obj.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed"):
        return ()
    given = [entry.get("ip") for entry in status.get("podIPs") or ()] or [status.get("podIP")]
    return tuple(str(address) for address in given if address)


def family_of(text: str) -> type[IPv4Address] | type[IPv6Address] | None:
    for family in (IPv4Address, IPv6Address):
        try:
            family(text)
        except AddressValueError:
            continue
        return family
    return None


def dashed_address(text: str) -> str:
    """Return the address of a pod's name, or ''."""
    is_v4 = text.count("-") == 3 and "--" not in text
    try:
        return str(IPv4Address(text.replace("-", "."))) if is_v4 else str(IPv6Address(text.replace("-", ":")))
    except AddressValueError:
        return ""


def reversed_address(name: str) -> str:
    """Return the IPv4 address of a name below in-addr.arpa, or ''."""
    if not name.endswith(f".{REVERSE_ZONE}"):
        return ""
    try:
        return str(IPv4Address(".".join(reversed(name[: -len(REVERSE_ZONE) - 1].split(".")))))
    except AddressValueError:
        return ""
