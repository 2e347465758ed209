"""What kube-proxy programs in ipvs mode: virtual servers, bound addresses, set members, and the rules on top. Pure.

::

    ProxyState ── render_service ── per service port: VirtualServer -> real servers, addresses, set members
                       │
                 IpvsRenderer: what all service ports want together; which of it one change adds and removes
                       │
                   plan(there, wanted) ── Change ── kernel/ipvs.py

A full sync plans from what the kernel lists, a partial one from what the changed service ports wanted before: the same
`plan` in both cases. Several service ports may want the same address (a ClusterIP with two ports) or set member; it goes
with the last of them.

Addresses and members are text in the form of ``ipvsadm -Sn`` and ``ipset save``: thousands of them are compared in every
full sync, which `ipaddress` objects make three times as long.

Source: kubernetes pkg/proxy/ipvs/proxier.go, syncProxyRules and syncEndpoint (v1.30).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple, TypeVar

from testbed.dataplane import ipvs_rules
from testbed.dataplane.ipvs_rules import IpvsRuleSettings
from testbed.dataplane.state import ProxyState
from testbed.dataplane.topology import ANNOTATED_ONLY, EndpointChoice, HintPolicy, choose_endpoints
from testbed.model.proxyconfig import KubeProxyConfig, local_detector, node_address
from testbed.model.service import Endpoint, NodeView, ServicePort, ServicePortName, TrafficPolicy, parse_network

_T = TypeVar("_T")
_LOCALHOST, _LOOPBACK = IPv4Address("127.0.0.1"), IPv4Network("127.0.0.0/8")


class VirtualServer(NamedTuple):
    """What identifies a virtual server; protocol as ipvsadm spells it, address as text."""

    protocol: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"{self.protocol} {self.address}:{self.port}"


class Balancing(NamedTuple):
    """How a virtual server chooses."""

    scheduler: str = "rr"
    persistence_s: int = 0  # 0: each connection is chosen for anew
    by_port: bool = False  # scheduler mh: hash the source port as well


class Server(NamedTuple):
    """A virtual server's way of choosing, and its real servers (``address:port``) with their weights."""

    balancing: Balancing
    real: Mapping[str, int]


RealServer = tuple[VirtualServer, str]
"""A virtual server and the ``address:port`` of one of its real servers."""

Member = tuple[str, str]
"""A set and one of its members, as ``ipset save`` prints it."""


@dataclass(frozen=True, slots=True)
class IpvsObjects:
    """What a node has, or is to have: addresses on kube-ipvs0, virtual servers, set members."""

    addresses: Set[str] = frozenset()
    servers: Mapping[VirtualServer, Server] = field(default_factory=dict)
    members: Set[Member] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class IpvsSettings:
    """Everything but Services and endpoints that the result depends on."""

    node: str = ""
    node_ip: IPv4Address = _LOCALHOST
    node_labels: Mapping[str, str] = field(default_factory=dict)
    hints: HintPolicy = ANNOTATED_ONLY
    scheduler: str = "rr"
    strict_arp: bool = False
    exclude_cidrs: tuple[IPv4Network, ...] = ()
    #: Where NodePorts answer.
    node_port_ips: tuple[str, ...] = ()
    #: The node's addresses on links other than kube-ipvs0: these are not bound a second time.
    local_addresses: frozenset[str] = frozenset()
    rules: IpvsRuleSettings = field(default_factory=IpvsRuleSettings)

    def is_excluded(self, address: str) -> bool:
        """Say whether a virtual server of others is to be left alone."""
        return bool(self.exclude_cidrs) and any(IPv4Address(address) in network for network in self.exclude_cidrs)


def make_ipvs_settings(
    config: KubeProxyConfig, node: NodeView, local_addresses: Collection[IPv4Address]
) -> IpvsSettings:
    """Return the settings of one node.

    Args:
        config: The node's kube-proxy configuration.
        node: Its Node object.
        local_addresses: Every address of the node, but for those on kube-ipvs0.
    """
    own, gates = node_address(config, node), config.feature_gates
    networks = [n for n in map(parse_network, config.node_port_addresses) if n is not None]
    answering = [
        a
        for a in sorted(local_addresses)
        if a not in _LOOPBACK and (not networks or any(a in network for network in networks))
    ]
    return IpvsSettings(
        node=node.name,
        node_ip=own,
        node_labels=node.labels,
        hints=HintPolicy(
            without_annotation=bool(gates.get("ServiceTrafficDistribution")),
            of_nodes=bool(gates.get("PreferSameTrafficDistribution")),
        ),
        scheduler=config.ipvs.scheduler,
        strict_arp=config.ipvs.strict_arp,
        exclude_cidrs=config.ipvs.exclude_cidrs,
        node_port_ips=tuple(map(str, answering)),
        local_addresses=frozenset(map(str, local_addresses)),
        rules=IpvsRuleSettings(
            detector=local_detector(config, node),
            masquerade_all=config.iptables.masquerade_all,
            mark=f"0x{1 << config.iptables.masquerade_bit:08x}",
        ),
    )


def render_sysctls(settings: IpvsSettings, kernel: tuple[int, int] = (6, 1)) -> dict[str, str]:
    """Return what ipvs mode sets in the node, by path below /proc/sys/net/ipv4.

    Args:
        settings: strictARP is the node's.
        kernel: Major and minor version: from 4.1 to 5.8 reuse of a client's port costs a second unless it is switched off.
    """
    values = {
        "vs/conntrack": "1",
        "vs/expire_nodest_conn": "1",
        "vs/expire_quiescent_template": "1",
        "ip_forward": "1",
    }
    if (4, 1) <= kernel < (5, 9):
        values["vs/conn_reuse_mode"] = "0"
    if settings.strict_arp:
        values |= {"conf/all/arp_ignore": "1", "conf/all/arp_announce": "2"}
    return values


# --- one service port ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServiceObjects:
    """What one service port wants."""

    servers: Mapping[VirtualServer, Server]
    addresses: tuple[str, ...]
    members: tuple[Member, ...]
    out_filter: tuple[str, ...]
    no_local_endpoints: tuple[bool, bool]  # internal, external: there are endpoints, but none here


def render_service(
    service: ServicePort, endpoints: Sequence[Endpoint], choice: EndpointChoice, settings: IpvsSettings
) -> ServiceObjects:
    """Return what one service port wants, for all its endpoints and those that were chosen for this node."""
    protocol, port = service.protocol.tool_name, service.port
    internal_local = service.internal_policy is TrafficPolicy.LOCAL
    external_local = service.external_policy is TrafficPolicy.LOCAL
    balancing = Balancing(settings.scheduler, service.affinity_timeout_s, settings.scheduler == "mh")
    cluster = dict.fromkeys((e.text for e in choice.cluster), 1)
    # Without a local endpoint those of other nodes serve pods and the node itself; answers to outside clients get lost.
    local = dict.fromkeys((e.text for e in choice.local), 1) or cluster
    internal = Server(balancing, local if internal_local else cluster)
    external = Server(balancing, local if external_local else cluster)

    cluster_ip = str(service.cluster_ip)
    servers = {VirtualServer(protocol, cluster_ip, port): internal}
    addresses = [cluster_ip]
    members: list[Member] = [(ipvs_rules.CLUSTER_IP, f"{cluster_ip},{protocol}:{port}")]
    out_filter: list[str] = []
    for endpoint in endpoints:
        if endpoint.is_local:
            address = str(endpoint.address)
            members.append((ipvs_rules.LOOP_BACK, f"{address},{protocol}:{endpoint.port},{address}"))
    for address in map(str, service.external_ips):
        name = ipvs_rules.EXTERNAL_IP_LOCAL if external_local else ipvs_rules.EXTERNAL_IP
        members.append((name, f"{address},{protocol}:{port}"))
        servers[VirtualServer(protocol, address, port)] = external
        addresses.append(address)
    for address in map(str, service.load_balancer_ips):
        members += _balancer_members(service, address, external_local, settings)
        if service.source_ranges and not _admits(service, settings.node_ip):
            out_filter.append(ipvs_rules.out_filter_rule(address, protocol, port))
        servers[VirtualServer(protocol, address, port)] = external
        addresses.append(address)
    if service.node_port:
        ports = [str(service.node_port)]
        if protocol == "sctp":  # a bitmap holds one protocol's ports, and the kernel has none for this one
            ports = [f"{address},sctp:{service.node_port}" for address in settings.node_port_ips]
        for sets in (ipvs_rules.NODE_PORT, *([ipvs_rules.NODE_PORT_LOCAL] if external_local else [])):
            members += [(sets[protocol], entry) for entry in ports]
        for address in settings.node_port_ips:
            servers[VirtualServer(protocol, address, service.node_port)] = external
    if service.health_check_node_port:
        members.append((ipvs_rules.HEALTH_CHECK, str(service.health_check_node_port)))
    # An address that another link has is the node's already.
    bound = tuple(a for a in dict.fromkeys(addresses) if a == cluster_ip or a not in settings.local_addresses)
    members += [(ipvs_rules.BOUND, address) for address in bound]
    return ServiceObjects(
        servers=servers,
        addresses=bound,
        members=tuple(dict.fromkeys(members)),
        out_filter=tuple(out_filter),
        no_local_endpoints=(
            choice.has_any and internal_local and not choice.local,
            choice.has_any and external_local and service.is_externally_accessible and not choice.local,
        ),
    )


def _admits(service: ServicePort, address: IPv4Address) -> bool:
    return any(address in network for network in service.source_ranges)


def _balancer_members(
    service: ServicePort, address: str, external_local: bool, settings: IpvsSettings
) -> Iterator[Member]:
    where = f"{address},{service.protocol.tool_name}:{service.port}"
    yield ipvs_rules.LOAD_BALANCER, where
    if external_local:
        yield ipvs_rules.LOAD_BALANCER_LOCAL, where
    if not service.source_ranges:
        return
    yield ipvs_rules.LOAD_BALANCER_FIREWALL, where
    for network in service.source_ranges:
        # A set cannot hold a network of everything (ipset(8)), its two halves it can. Upstream fails to add it.
        for part in network.subnets() if network.prefixlen == 0 else (network,):
            text = str(part.network_address) if part.prefixlen == 32 else str(part)
            yield ipvs_rules.SOURCE_CIDR, f"{where},{text}"
    if _admits(service, settings.node_ip):
        # The node's own packets to the address loop back with that address as their source.
        yield ipvs_rules.SOURCE_IP, f"{where},{address}"


# --- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """What to do, in this order; each list is empty when there is nothing of its kind."""

    bind: tuple[str, ...] = ()
    add_servers: tuple[tuple[VirtualServer, Balancing], ...] = ()
    set_servers: tuple[tuple[VirtualServer, Balancing], ...] = ()
    #: Are still there with weight 0, waiting for their connections to end; taken away and added anew.
    renew_real: tuple[RealServer, ...] = ()
    add_real: tuple[RealServer, ...] = ()
    #: Are there with another weight than they are to have.
    set_real: tuple[tuple[VirtualServer, str, int], ...] = ()
    #: Are not wanted any more. How they go, at once or when their connections have ended, is `retire`'s decision.
    retire_real: tuple[RealServer, ...] = ()
    delete_real: tuple[RealServer, ...] = ()
    add_members: tuple[Member, ...] = ()
    delete_servers: tuple[VirtualServer, ...] = ()
    delete_members: tuple[Member, ...] = ()
    unbind: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(len(getattr(self, name)) for name in self.__slots__)


def plan(
    there: IpvsObjects,
    wanted: IpvsObjects,
    settings: IpvsSettings,
    retiring: Collection[tuple[VirtualServer, str]] = (),
) -> Change:
    """Return what makes a node that has ``there`` have ``wanted``.

    Args:
        there: What it has.
        wanted: What it is to have; of the same addresses, servers and members, for a part of the whole.
        settings: Its excludeCIDRs protect virtual servers that nobody wants.
        retiring: Real servers that wait for their connections to end: they are there, and are to stay until then.
    """
    add_servers, set_servers, add_real, set_real, retire = [], [], [], [], []
    for key, server in wanted.servers.items():
        old = there.servers.get(key)
        if old is None:
            add_servers.append((key, server.balancing))
            add_real += [(key, real) for real in server.real]
            continue
        if old is server:
            continue
        if old.balancing != server.balancing:
            set_servers.append((key, server.balancing))
        for real, weight in server.real.items():
            if real not in old.real or (key, real) in retiring:
                add_real.append((key, real))
            elif old.real[real] != weight:
                set_real.append((key, real, weight))
        retire += [(key, real) for real in old.real if real not in server.real and (key, real) not in retiring]
    gone = [key for key in there.servers if key not in wanted.servers and not settings.is_excluded(key.address)]
    return Change(
        bind=tuple(sorted(wanted.addresses - there.addresses)),
        add_servers=tuple(add_servers),
        set_servers=tuple(set_servers),
        add_real=tuple(add_real),
        set_real=tuple(set_real),
        add_members=tuple(sorted(wanted.members - there.members)),
        retire_real=tuple(retire),
        delete_servers=tuple(gone),
        delete_members=tuple(sorted(there.members - wanted.members)),
        unbind=tuple(sorted(there.addresses - wanted.addresses)),
    )


def retire(change: Change, connections: Mapping[RealServer, int], retiring: Collection[RealServer]) -> Change:
    """Return a change that says how its real servers go, and how those come back that have not gone yet.

    A TCP server with connections gets weight 0: no new ones are sent to it, and it is deleted when they have ended. Others
    are deleted at once; what is left of a UDP flow goes with its next packet (expire_nodest_conn).

    Args:
        change: What to do.
        connections: Of each TCP server that is to go, if it is there.
        retiring: Those that are going already.

    Source: kubernetes pkg/proxy/ipvs/graceful_termination.go (v1.30).
    """
    waiting = [one for one in change.retire_real if one[0].protocol == "tcp" and connections.get(one)]
    back = {one for one in change.add_real if one in retiring}
    return replace(
        change,
        renew_real=tuple(one for one in change.add_real if one in back),
        add_real=tuple(one for one in change.add_real if one not in back),
        set_real=(
            *(one for one in change.set_real if one[:2] not in retiring),
            *((key, real, 0) for key, real in waiting),
        ),
        retire_real=(),
        delete_real=(*change.delete_real, *(one for one in change.retire_real if one not in waiting)),
    )


def describe(change: Change) -> str:
    """Return in a few words what a node lacks or has too much of, or ''."""
    found = [
        *(f"the address {address} is gone from {ipvs_rules.DEVICE}" for address in change.bind),
        *(f"the virtual server {key} is gone" for key, _ in change.add_servers),
        *(f"the virtual server {key} has another scheduler or persistence" for key, _ in change.set_servers),
        *(f"the real server {real} of {key} is gone" for key, real in change.add_real),
        *(f"the real server {real} of {key} has another weight" for key, real, _ in change.set_real),
        *(f"{entry} is gone from the set {name}" for name, entry in change.add_members),
        *(f"there is a real server {real} of {key}" for key, real in change.retire_real),
        *(f"there is a virtual server {key}" for key in change.delete_servers),
        *(f"the set {name} has {entry}" for name, entry in change.delete_members),
        *(f"{ipvs_rules.DEVICE} has the address {address}" for address in change.unbind),
    ]
    return "" if not found else found[0] + (f", and {len(found) - 1} more" if len(found) > 1 else "")


@dataclass(frozen=True, slots=True)
class _Known:
    """What a service port wants, and what that was rendered from."""

    service: ServicePort
    endpoints: tuple[Endpoint, ...]
    objects: ServiceObjects


class IpvsRenderer:
    """Knows what every service port wants, and what they want together."""

    def __init__(self, settings: IpvsSettings) -> None:
        self.settings = settings
        self._known: dict[ServicePortName, _Known] = {}
        self._addresses: Counter[str] = Counter()
        self._members: Counter[Member] = Counter()
        self._set_sizes: Counter[str] = Counter()
        self._servers: dict[VirtualServer, dict[ServicePortName, Server]] = {}
        self._out_filter: dict[ServicePortName, tuple[str, ...]] = {}
        self._no_local = [0, 0]

    @property
    def no_local_endpoints(self) -> tuple[int, int]:
        """Service ports without local endpoints: internal, external policy."""
        return self._no_local[0], self._no_local[1]

    def update(self, state: ProxyState, changed: Collection[ServicePortName] | None = None) -> Change:
        """Take in a state and return what that changes, given that all before was in place.

        Args:
            state: The new state.
            changed: Names what differs from the one before; None: anything may.
        """
        names: Collection[ServicePortName] = {*state.services, *self._known} if changed is None else changed
        replaced: list[tuple[ServicePortName, _Known | None, _Known | None]] = []
        for name in sorted(names):
            old, service = self._known.get(name), state.services.get(name)
            endpoints = state.endpoints.get(name, ())
            if service is None:
                if old is not None:
                    replaced.append((name, old, None))
            elif old is None or old.service is not service or old.endpoints is not endpoints:
                replaced.append((name, old, _Known(service, endpoints, self._render(service, endpoints))))
        touched = [known.objects for _, *both in replaced for known in both if known is not None]
        before = self._part(touched)
        for name, old, new in replaced:
            self._replace(name, old, new)
        return plan(before, self._part(touched), self.settings)

    def _render(self, service: ServicePort, endpoints: tuple[Endpoint, ...]) -> ServiceObjects:
        settings = self.settings
        choice = choose_endpoints(service, endpoints, settings.node_labels, settings.node, settings.hints)
        return render_service(service, endpoints, choice, settings)

    def _part(self, touched: Iterable[ServiceObjects]) -> IpvsObjects:
        """Return what is wanted of the things that these objects name."""
        addresses: set[str] = set()
        members: set[Member] = set()
        servers: dict[VirtualServer, Server] = {}
        for objects in touched:
            addresses |= {a for a in objects.addresses if self._addresses[a] > 0}
            members |= {m for m in objects.members if self._members[m] > 0}
            servers |= {key: self._server(key) for key in objects.servers if key in self._servers}
        return IpvsObjects(addresses, servers, members)

    def _server(self, key: VirtualServer) -> Server:
        wanting = self._servers[key]
        return wanting[min(wanting)] if len(wanting) > 1 else next(iter(wanting.values()))

    def _replace(self, name: ServicePortName, old: _Known | None, new: _Known | None) -> None:
        for known, sign in ((old, -1), (new, 1)):
            if known is None:
                continue
            objects = known.objects
            _count(self._addresses, objects.addresses, sign)
            for member in _count(self._members, objects.members, sign):
                self._set_sizes[member[0]] += sign
            for key, server in objects.servers.items():
                if sign > 0:
                    self._servers.setdefault(key, {})[name] = server
                else:
                    del self._servers[key][name]
                    if not self._servers[key]:
                        del self._servers[key]
            for index, without in enumerate(objects.no_local_endpoints):
                self._no_local[index] += sign * without
        self._known.pop(name, None)
        self._out_filter.pop(name, None)
        if new is not None:
            self._known[name] = new
            if new.objects.out_filter:
                self._out_filter[name] = new.objects.out_filter

    def wanted(self) -> IpvsObjects:
        """Return what all service ports want together."""
        return IpvsObjects(
            frozenset(self._addresses), {key: self._server(key) for key in self._servers}, frozenset(self._members)
        )

    def rules(self) -> dict[str, dict[str, list[str]]]:
        """Return the iptables rules that belong to the present members: table -> chain -> rules."""
        used = {name for name, size in self._set_sizes.items() if size > 0}
        out_filter = [rule for name in sorted(self._out_filter) for rule in self._out_filter[name]]
        return ipvs_rules.render_rules(self.settings.rules, used, out_filter)

    def rules_key(self) -> object:
        """Return what the rules depend on: as long as it is equal, so are they."""
        used = frozenset(name for name, size in self._set_sizes.items() if size > 0)
        return self.settings.rules, used, tuple(self._out_filter[name] for name in sorted(self._out_filter))

    def owners_of(self, things: Iterable[object]) -> dict[object, ServicePortName]:
        """Return who wants each of these addresses, members and virtual servers."""
        wanted = set(things)
        found: dict[object, ServicePortName] = {}
        for name, known in self._known.items():
            objects = known.objects
            for thing in (*objects.addresses, *objects.members, *objects.servers):
                if thing in wanted:
                    found.setdefault(thing, name)
        return found


def _count(counter: Counter[_T], things: Iterable[_T], sign: int) -> list[_T]:
    """Count things up or down, and return those that were the first or the last of their kind."""
    turned = []
    for thing in things:
        counter[thing] += sign
        if counter[thing] == (sign > 0):
            turned.append(thing)
        if counter[thing] == 0:
            del counter[thing]
    return turned


# --- for people ------------------------------------------------------------------------------------------------------

_OPTIONS: Mapping[str, str] = {"tcp": "-t", "udp": "-u", "sctp": "--sctp-service"}


def render_servers(servers: Mapping[VirtualServer, Server]) -> list[str]:
    """Return the lines that ``ipvsadm -Sn`` prints."""
    lines = []
    for key in sorted(servers):
        where = f"{_OPTIONS[key.protocol]} {key.address}:{key.port}"
        scheduler, persistence_s, by_port = servers[key].balancing
        persistent = f" -p {persistence_s}" if persistence_s else ""
        lines.append(f"-A {where} -s {scheduler}{persistent}{' -b mh-port' if by_port else ''}")
        lines += [f"-a {where} -r {real} -m -w {weight}" for real, weight in servers[key].real.items()]
    return lines


def render_sets(members: Iterable[Member]) -> list[str]:
    """Return the lines that ``ipset save`` prints, without bucketsize and initval: sets first."""
    lines = []
    for name, kind in ipvs_rules.SETS.items():
        options = ipvs_rules.BITMAP_OPTIONS if kind == "bitmap:port" else ipvs_rules.HASH_OPTIONS
        lines.append(f"create {name} {kind} {options}")
    return lines + [f"add {name} {entry}" for name, entry in sorted(members)]


def render_document(state: ProxyState, settings: IpvsSettings) -> str:
    """Return all that ipvs mode programs on a node that has nothing yet, in the tools' own words."""
    renderer = IpvsRenderer(settings)
    renderer.update(state)
    wanted = renderer.wanted()
    sections = {
        "ipvsadm -Sn": render_servers(wanted.servers),
        "ipset save": render_sets(wanted.members),
        ipvs_rules.DEVICE: [f"{address}/32" for address in sorted(wanted.addresses, key=IPv4Address)],
        "sysctl": [f"{name} = {value}" for name, value in render_sysctls(settings).items()],
        "iptables": ipvs_rules.render_payload(renderer.rules()).splitlines(),
    }
    return "".join(f"# {title}\n" + "".join(f"{line}\n" for line in lines) for title, lines in sections.items())
