"""The zone of cluster DNS: Services, EndpointSlices, namespaces and pods in, records and answers out. Pure.

::

    Service, ClusterIP     S.N.svc A ClusterIP · _port._proto.S.N.svc SRV · PTR S.N.svc
    Service, headless      S.N.svc A ready addresses · NAME.S.N.svc A · SRV one an address and port · PTR NAME.S.N.svc
    ExternalName           S.N.svc CNAME, and what the target has
    pod                    10-244-1-5.N.pod A 10.244.1.5

dnsmasq is asked first and says what a hosts file can say (`Zone.hosts_text`): the addresses of Services. Everything else is
`Zone.answer`, which is given to dnsmasq as its upstream: other types, SRV, CNAME, pods, and the difference between a name
that is not there (NXDOMAIN) and one that has nothing of a type (NODATA).

A hosts file gives one PTR to an address. An address behind several Services has several, so Services that share an
address with another one are left out of it, and answered by `Zone.answer` whole.

Source: Kubernetes DNS-Based Service Discovery 1.1.0; CoreDNS v1.11 plugin/kubernetes and plugin/backend_lookup.go, whose
answers are copied where the specification is silent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final

from testbed.model.dns import (
    NO_PORT,
    REVERSE_ZONE,
    REVERSE_ZONE_6,
    Answer,
    DnsEndpoint,
    DnsPort,
    DnsService,
    PodMode,
    Rcode,
    Record,
    RecordType,
    ZoneSettings,
    dashed_address,
    family_of,
    parse_dns_pod,
    parse_dns_service,
    parse_dns_slice,
    reversed_address,
)
from testbed.model.objects import Object, name_of, namespace_of

SERVICES: Final = "services"
SLICES: Final = "endpointslices.discovery.k8s.io"
NAMESPACES: Final = "namespaces"
PODS: Final = "pods"

SCHEMA_VERSION: Final = "1.1.0"
_SCHEMA_TTL_S: Final = 28800
_SOA_TIMES: Final = (7200, 1800, 86400)  # refresh, retry, expire
_MAX_CHAIN: Final = 8  # CNAMEs one after another, as CoreDNS
_MAX_NAME: Final = 253
_MAX_LABEL: Final = 63


@dataclass(frozen=True, slots=True)
class _Entry:
    """What stands behind a name: an address (with a name of its own and a port) or an alias."""

    name: str
    address: str = ""
    port: int = NO_PORT
    alias: str = ""


_Key = tuple[str, str]
_FAMILIES: Final[Mapping[int, type]] = {RecordType.A: IPv4Address, RecordType.AAAA: IPv6Address}


class _NameError(Exception):
    """There is no such name."""


def domain_key(name: str) -> str:
    """Return a name as it is compared: lower case, without the final dot."""
    return name.lower().removesuffix(".")


def can_be_sent(name: str) -> bool:
    """Say whether a name fits into a DNS message (RFC 1035, 2.3.4). The API lets longer labels pass, as upstream's does."""
    return len(name) <= _MAX_NAME and all(0 < len(label) <= _MAX_LABEL for label in name.split("."))


def is_within(name: str, zone: str) -> bool:
    """Say whether a name (`domain_key`) is a zone's own or below it."""
    return name == zone or name.endswith(f".{zone}") or not zone


class Zone:
    """The cluster's objects as last heard of, and what DNS says of them. A change costs what changed."""

    def __init__(self, settings: ZoneSettings) -> None:
        self._settings = settings
        self._services: dict[_Key, DnsService] = {}
        self._slices: dict[_Key, tuple[_Key, tuple[DnsEndpoint, ...]]] = {}  # slice -> its Service, its endpoints
        self._slices_of: dict[_Key, dict[_Key, None]] = {}
        self._namespaces: set[str] = set()
        self._pods: dict[_Key, tuple[str, ...]] = {}
        self._pods_at: dict[str, dict[_Key, None]] = {}
        self._cluster_ips: dict[str, dict[_Key, None]] = {}
        self._owners: dict[str, dict[_Key, int]] = {}  # address -> Services with it, and how often
        self._dirty: set[_Key] = set()  # Services whose lines of the hosts file may change
        self._lines: tuple[dict[_Key, str], dict[_Key, str]] = {}, {}  # of ClusterIPs, of headless Services
        self._serial = 1

    @property
    def settings(self) -> ZoneSettings:
        return self._settings

    def configure(self, settings: ZoneSettings) -> None:
        """Take other settings."""
        self._settings = settings
        self._serial += 1
        self._dirty.update(self._services)

    # -- objects in ------------------------------------------------------------------------------------------------

    def replace(self, resource: str, objects: Iterable[Object]) -> None:
        """Take a complete list of a resource: what is not in it is gone."""
        listed = {(namespace_of(obj), name_of(obj)): obj for obj in objects}
        for key in list(self._known(resource)):
            if key not in listed:
                self.delete(resource, *key)
        for obj in listed.values():
            self.put(resource, obj)

    def _known(self, resource: str) -> Iterator[_Key]:
        match resource:
            case "services":
                yield from self._services
            case "pods":
                yield from self._pods
            case "namespaces":
                yield from (("", name) for name in self._namespaces)
            case _:
                yield from self._slices

    def put(self, resource: str, obj: Object) -> None:
        """Take an object that was made or changed."""
        key = (namespace_of(obj), name_of(obj))
        self._serial += 1
        match resource:
            case "services":
                self._put_service(key, parse_dns_service(obj))
            case "namespaces":
                if key[1] not in self._namespaces:
                    self._namespaces.add(key[1])
                    self._touch_namespace(key[1])
            case "pods":
                self._put_pod(key, parse_dns_pod(obj))
            case _:
                self._put_slice(key, *parse_dns_slice(obj))

    def delete(self, resource: str, namespace: str, name: str) -> None:
        """Forget an object; succeeds when it is not known."""
        key = (namespace, name)
        self._serial += 1
        match resource:
            case "services":
                self._put_service(key, None)
            case "namespaces":
                self._namespaces.discard(name)
                self._touch_namespace(name)
            case "pods":
                self._put_pod(key, ())
            case _:
                self._put_slice(key, None, ())

    def _touch_namespace(self, name: str) -> None:
        for key, service in self._services.items():
            if key[0] == name:
                self._dirty.add(key)
                for address in service.cluster_ips:
                    self._dirty.update(self._owners.get(address, ()))

    def _put_service(self, key: _Key, service: DnsService | None) -> None:
        before = self._services.pop(key, None)
        for address in before.cluster_ips if before else ():
            _discard(self._cluster_ips, address, key)
            self._dirty.update(self._owners.get(address, ()))
        if service is not None:
            self._services[key] = service
            for address in service.cluster_ips:
                self._cluster_ips.setdefault(address, {})[key] = None
                self._dirty.update(self._owners.get(address, ()))
        self._dirty.add(key)

    def _put_slice(self, key: _Key, owner: _Key | None, endpoints: tuple[DnsEndpoint, ...]) -> None:
        """Take a slice in by what differs: a Service may have hundreds of endpoints, of which one changes."""
        old_owner, old = self._slices.pop(key, (None, ()))
        if old_owner is not None and old_owner != owner:
            _discard(self._slices_of, old_owner, key)
        if owner is not None:
            self._slices[key] = (owner, endpoints)
            self._slices_of.setdefault(owner, {})[key] = None
        is_moved = owner != old_owner
        gone = set(old) if is_moved else set(old) - set(endpoints)
        came = set(endpoints) if is_moved else set(endpoints) - set(old)
        for service, changed, step in ((old_owner, gone, -1), (owner, came, 1)):
            if service is not None and changed:
                self._dirty.add(service)
                for endpoint in changed:
                    self._count(endpoint.address, service, step)

    def _count(self, address: str, service: _Key, step: int) -> None:
        """Note that a Service has an address once more or less. Whoever shares it may move out of the hosts file, or back."""
        owners = self._owners.setdefault(address, {})
        owners[service] = owners.get(service, 0) + step
        if not owners[service]:
            del owners[service]
        self._dirty.update(owners)
        if not owners:
            del self._owners[address]

    def _endpoints(self, service: _Key) -> dict[DnsEndpoint, None]:
        """Return the endpoints of a Service in the order of its slices, each once."""
        slices = sorted(self._slices_of.get(service, ()))
        return dict.fromkeys(endpoint for key in slices for endpoint in self._slices[key][1])

    def _put_pod(self, key: _Key, addresses: tuple[str, ...]) -> None:
        for address in self._pods.pop(key, ()):
            _discard(self._pods_at, address, key)
        if addresses:
            self._pods[key] = addresses
        for address in addresses:
            self._pods_at.setdefault(address, {})[key] = None

    # -- for dnsmasq -----------------------------------------------------------------------------------------------

    def hosts_text(self) -> str:
        """Return the hosts file: addresses of Services, each line beginning with the name that the address's PTR gives.

        ClusterIPs come first, because the first line of an address decides about its PTR.
        """
        cluster, headless = self._lines
        for key in self._dirty:
            cluster.pop(key, None)
            headless.pop(key, None)
            service = self._services.get(key)
            if service is None or key[0] not in self._namespaces:
                continue  # what is in no namespace has no name
            name = self._service_name(key)
            if service.cluster_ips:
                cluster[key] = "".join(f"{address} {name}\n" for address in service.cluster_ips)
            elif service.is_headless and (lines := self._headless_lines(key, name)):
                headless[key] = lines
        self._dirty.clear()
        return "".join([*(cluster[key] for key in sorted(cluster)), *(headless[key] for key in sorted(headless))])

    def _headless_lines(self, key: _Key, name: str) -> str:
        lines: dict[tuple[IPv4Address, str], str] = {}
        for endpoint in self._endpoints(key):
            if not self._has_one_name(endpoint.address):
                return ""
            place = (IPv4Address(endpoint.address), endpoint.label)
            lines[place] = f"{endpoint.address} {endpoint.label}.{name} {name}\n"
        return "".join(lines[place] for place in sorted(lines))

    def _has_one_name(self, address: str) -> bool:
        """Say whether a hosts file can give all of an address's PTR records, which is one."""
        if address in self._cluster_ips:
            return min(self._cluster_ips[address])[0] in self._namespaces  # then its line comes first
        owners = self._owners.get(address, {})
        return len(owners) == 1 and (1 in owners.values() or len(self._names_at(address)) == 1)

    def _names_at(self, address: str) -> list[str]:
        """Return the names behind an address, in the order of the Services."""
        if address in self._cluster_ips:
            return [self._service_name(min(self._cluster_ips[address]))]
        found = [
            f"{endpoint.label}.{self._service_name(key)}"
            for key in sorted(self._owners.get(address, ()))
            for endpoint in self._endpoints(key)
            if endpoint.address == address
        ]
        return list(dict.fromkeys(found))

    def _service_name(self, key: _Key) -> str:
        return f"{key[1]}.{key[0]}.svc.{self._settings.domain}"

    # -- answers ---------------------------------------------------------------------------------------------------

    def answer(self, question: str, rtype: int) -> Answer:
        """Return the answer to a question, whose name the records repeat as it was written.

        A name outside the zone falls through.
        """
        name = domain_key(question)
        settings = self._settings
        if is_within(name, settings.domain):
            zone = settings.domain
        elif is_within(name, REVERSE_ZONE):
            zone = REVERSE_ZONE
        elif is_within(name, REVERSE_ZONE_6):
            zone = REVERSE_ZONE_6
        else:
            return Answer(rcode=Rcode.SERVFAIL, falls_through=True)
        try:
            found = self._found(question.removesuffix("."), name, zone, rtype)
        except _NameError:
            falls = any(is_within(name, other) and is_within(other, zone) for other in settings.fallthrough)
            return Answer(rcode=Rcode.NXDOMAIN, authority=(self._soa(zone),), falls_through=falls)
        return found if found.records else Answer(authority=(self._soa(zone),), outside=found.outside)

    def _soa(self, zone: str) -> Record:
        ttl = self._settings.ttl
        value = (f"ns.dns.{zone}", f"hostmaster.{zone}", self._serial & 0xFFFFFFFF, *_SOA_TIMES, ttl)
        return Record(zone, RecordType.SOA, min(ttl, 300), value)

    def _found(self, question: str, name: str, zone: str, rtype: int) -> Answer:
        if name == zone and rtype == RecordType.SOA:
            return Answer(records=(self._soa(zone),))
        if name == zone and rtype == RecordType.NS:
            return self._name_servers(question)
        if rtype == RecordType.PTR:
            return self._pointers(question, name, zone)
        if zone != self._settings.domain:
            if name == zone:
                return Answer()
            raise _NameError
        ttl = self._settings.ttl
        if rtype == RecordType.TXT:
            if name == f"dns-version.{zone}":
                return Answer(records=(Record(question, RecordType.TXT, _SCHEMA_TTL_S, SCHEMA_VERSION),))
            return Answer()  # whether the name is there or not, as CoreDNS
        entries = self._entries(name)
        if rtype == RecordType.SRV:
            return self._services_at(question, [entry for entry in entries if not entry.alias])
        if rtype == RecordType.CNAME:
            alias = next((entry.alias for entry in entries), "")
            has_one = bool(alias) and can_be_sent(alias)
            return Answer(records=(Record(question, RecordType.CNAME, ttl, alias),) if has_one else ())
        return self._addresses(question, name, rtype, entries, ())

    def _addresses(
        self, question: str, name: str, rtype: int, entries: list[_Entry], before: tuple[str, ...]
    ) -> Answer:  # fmt: skip
        """Return A or AAAA records, following aliases as long as they stay in the zone."""
        ttl, family = self._settings.ttl, _FAMILIES.get(rtype)
        if family is None:
            return Answer()
        if entries and (alias := entries[0].alias):
            target = domain_key(alias)
            if target == name or target in before or len(before) >= _MAX_CHAIN or not can_be_sent(alias):
                return Answer()
            link = Record(question, RecordType.CNAME, ttl, alias)
            if not is_within(target, self._settings.domain):
                return Answer(records=(link,), outside=alias)
            try:
                rest = self._addresses(alias, target, rtype, self._entries(target), (*before, target))
            except _NameError:
                return Answer()
            return Answer(records=(link, *rest.records), outside=rest.outside) if rest.records else Answer()
        addresses = dict.fromkeys(entry.address for entry in entries if family_of(entry.address) is family)
        return Answer(records=tuple(Record(question, RecordType(rtype), ttl, address) for address in addresses))

    def _services_at(self, question: str, entries: list[_Entry]) -> Answer:
        """Return SRV records, and the addresses of their targets beside them."""
        ttl = self._settings.ttl
        records: dict[tuple[str, int], Record] = {}
        extra: dict[tuple[str, str], Record] = {}
        for entry in entries:
            if entry.port == NO_PORT:
                continue
            weight = max(1, 100 // len(entries))
            value = (0, weight, entry.port, entry.name)
            records.setdefault((entry.name, entry.port), Record(question, RecordType.SRV, ttl, value))
            kind = RecordType.A if family_of(entry.address) is IPv4Address else RecordType.AAAA
            extra.setdefault((entry.name, entry.address), Record(entry.name, kind, ttl, entry.address))
        return Answer(records=tuple(records.values()), additional=tuple(extra.values()))

    def _name_servers(self, question: str) -> Answer:
        """Return the Services that this server is behind, as the zone's name servers."""
        ttl = self._settings.ttl
        keys = [key for key in sorted(self._owners.get(self._settings.server, ())) if key in self._services]
        addresses = [(self._service_name(key), ip) for key in keys for ip in self._services[key].cluster_ips]
        names = dict.fromkeys(name for name, _ in addresses)
        return Answer(
            records=tuple(Record(question, RecordType.NS, ttl, name) for name in names),
            additional=tuple(
                Record(name, RecordType.A, ttl, ip) for name, ip in addresses if family_of(ip) is IPv4Address
            ),
        )

    def _pointers(self, question: str, name: str, zone: str) -> Answer:
        address = reversed_address(name)
        if not address:
            if zone == self._settings.domain:
                self._entries(name)  # a name that is there has no PTR; one that is not is not there
                return Answer()
            if name == zone:
                return Answer()
            raise _NameError
        names = self._names_at(address)
        if not names:
            raise _NameError
        ttl = self._settings.ttl
        return Answer(records=tuple(Record(question, RecordType.PTR, ttl, target) for target in names))

    # -- names -----------------------------------------------------------------------------------------------------

    def _entries(self, name: str) -> list[_Entry]:
        """Return what stands behind a name of the zone; nothing for names that only have names below them.

        Raises:
            _NameError: there is no such name.
        """
        domain = self._settings.domain
        if name == f"ns.dns.{domain}":
            servers = self._name_servers(name).additional
            return [_Entry(name, address=str(record.value)) for record in servers]
        labels = name[: -len(domain) - 1].split(".") if name != domain else []
        if not labels:
            return []
        kind = labels.pop()
        if kind not in ("svc", "pod"):
            raise _NameError
        if not labels:
            return []
        namespace = labels.pop()
        if namespace not in self._namespaces:
            raise _NameError
        if not labels:
            return []
        subject = labels.pop()
        if len(labels) > 2:
            raise _NameError
        if kind == "pod":
            return self._pod_entries(name, namespace, subject)
        service = self._services.get((namespace, subject))
        if service is None:
            raise _NameError
        return self._service_entries(service, labels)

    def _pod_entries(self, name: str, namespace: str, dashed: str) -> list[_Entry]:
        address = dashed_address(dashed)
        mode = self._settings.pods
        is_there = mode is PodMode.INSECURE or (
            mode is PodMode.VERIFIED and any(key[0] == namespace for key in self._pods_at.get(address, ()))
        )
        if not address or not is_there:
            raise _NameError
        return [_Entry(name, address=address)]

    def _service_entries(self, service: DnsService, labels: list[str]) -> list[_Entry]:
        """Return what is behind the labels left of a Service's name: none, an endpoint's, or a port and a protocol."""
        label = labels[0] if len(labels) == 1 else ""
        port, protocol = (text.removeprefix("_") for text in labels) if len(labels) == 2 else ("", "")
        key = (service.namespace, service.name)
        name = self._service_name(key)

        def fits(candidate: DnsPort) -> bool:
            return port in ("", candidate.name) and protocol in ("", candidate.protocol)

        found: list[_Entry] = []
        if service.external_name:
            if not label:
                found = [_Entry(name, alias=service.external_name)]
        elif label or service.is_headless:
            found = [
                _Entry(f"{endpoint.label}.{name}", address=endpoint.address, port=candidate.number)
                for endpoint in self._endpoints(key)
                if label in ("", endpoint.label)
                for candidate in endpoint.ports
                if fits(candidate)
            ]
        else:
            found = [
                _Entry(name, address=address, port=candidate.number)
                for candidate in service.ports
                if fits(candidate)
                for address in service.cluster_ips
            ]
        if not found:
            raise _NameError
        return found


def _discard(table: dict[Any, dict[_Key, None]], place: Any, key: _Key) -> None:
    keys = table.get(place, {})
    keys.pop(key, None)
    if not keys:
        table.pop(place, None)
