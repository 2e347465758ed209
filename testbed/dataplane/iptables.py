"""What kube-proxy writes in iptables mode: pure text for one ``iptables-restore --noflush --counters``.

::

    PREROUTING, OUTPUT ─ KUBE-SERVICES ─┬─ ClusterIP ──────── KUBE-SVC or KUBE-SVL ─ KUBE-SEP ─ DNAT
        (nat)                           ├─ external IP ────── KUBE-EXT ─┤
                                        ├─ load balancer IP ─ KUBE-FW ─ KUBE-EXT
                                        └─ last: to this node KUBE-NODEPORTS ─ KUBE-EXT
    INPUT, FORWARD, OUTPUT (filter): KUBE-SERVICES, KUBE-EXTERNAL-SERVICES refuse what has no endpoints,
                                     KUBE-PROXY-FIREWALL drops what KUBE-FW did not admit
    POSTROUTING (nat): KUBE-POSTROUTING masquerades marked packets

One service port is rendered into one `ServiceRules`, which is kept while its input stays the same. A payload joins them:
the dispatch rules of every service port (their chains are shared and rewritten whole), and the chains of those that
changed; `--noflush` keeps the others.

Source: kubernetes pkg/proxy/iptables/proxier.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from testbed.dataplane import chains
from testbed.dataplane.state import ProxyState
from testbed.dataplane.topology import ANNOTATED_ONLY, EndpointChoice, HintPolicy, choose_endpoints
from testbed.model.proxyconfig import PRIMARY, KubeProxyConfig, LocalDetector, Origin, local_detector, node_address
from testbed.model.service import Endpoint, NodeView, ServicePort, ServicePortName, TrafficPolicy, parse_network

#: Above this many endpoints over all service ports, comments are left out where there are most rules.
LARGE_CLUSTER_ENDPOINTS = 1000

_LOCALHOST = IPv4Address("127.0.0.1")
_LOOPBACK = IPv4Network("127.0.0.0/8")
_LAST_COMMENT = '"kubernetes service nodeports; NOTE: this must be the last rule in this chain"'


@dataclass(frozen=True, slots=True)
class Jump:
    """A rule of a built-in chain that leads into ours; ``rule`` is what follows the chain's name, as it is saved."""

    table: str
    chain: str
    rule: str

    @property
    def saved(self) -> str:
        return f"-A {self.chain} {self.rule}"


def _jump(table: str, chain: str, target: str, comment: str, *, new: bool = False) -> Jump:
    match = "-m conntrack --ctstate NEW " if new else ""
    return Jump(table, chain, f'{match}-m comment --comment "{comment}" -j {target}')


_VISIBLE, _PORTALS = "kubernetes externally-visible service portals", "kubernetes service portals"
_BALANCER = "kubernetes load balancer firewall"

#: In the order in which they are inserted, each on top of its chain: the last one ends up first.
JUMPS: tuple[Jump, ...] = (
    _jump("filter", "INPUT", chains.EXTERNAL_SERVICES, _VISIBLE, new=True),
    _jump("filter", "FORWARD", chains.EXTERNAL_SERVICES, _VISIBLE, new=True),
    _jump("filter", "INPUT", chains.NODE_PORTS, "kubernetes health check service ports"),
    _jump("filter", "FORWARD", chains.SERVICES, _PORTALS, new=True),
    _jump("filter", "OUTPUT", chains.SERVICES, _PORTALS, new=True),
    _jump("filter", "FORWARD", chains.FORWARD, "kubernetes forwarding rules"),
    _jump("filter", "INPUT", chains.PROXY_FIREWALL, _BALANCER, new=True),
    _jump("filter", "OUTPUT", chains.PROXY_FIREWALL, _BALANCER, new=True),
    _jump("filter", "FORWARD", chains.PROXY_FIREWALL, _BALANCER, new=True),
    # kubelet ensures the same two, which is why they carry no comment
    Jump("filter", "INPUT", f"-j {chains.FIREWALL}"),
    Jump("filter", "OUTPUT", f"-j {chains.FIREWALL}"),
    _jump("nat", "OUTPUT", chains.SERVICES, _PORTALS),
    _jump("nat", "PREROUTING", chains.SERVICES, _PORTALS),
    _jump("nat", "POSTROUTING", chains.POSTROUTING, "kubernetes postrouting rules"),
)

CANARY_TABLES = ("mangle", "nat", "filter")

_FILTER_CHAINS = (
    chains.SERVICES, chains.EXTERNAL_SERVICES, chains.FORWARD, chains.NODE_PORTS, chains.PROXY_FIREWALL, chains.FIREWALL,
)  # fmt: skip
_NAT_CHAINS = (chains.SERVICES, chains.NODE_PORTS, chains.POSTROUTING, chains.MARK_MASQ)


@dataclass(frozen=True, slots=True, kw_only=True)
class IptablesSettings:
    """Everything but Services and endpoints that the rules depend on."""

    node: str = ""
    node_ip: IPv4Address = _LOCALHOST
    node_labels: Mapping[str, str] = field(default_factory=dict)
    detector: LocalDetector | None = None
    masquerade_all: bool = False
    masquerade_bit: int = 14
    localhost_node_ports: bool = True
    #: Where NodePorts answer; None is every local address.
    node_port_ips: tuple[IPv4Address, ...] | None = None
    drops_invalid: bool = True
    random_fully: bool = True  # iptables 1.6.2 and later
    hints: HintPolicy = ANNOTATED_ONLY

    @property
    def mark(self) -> str:
        return f"0x{1 << self.masquerade_bit:08x}"


def make_settings(
    config: KubeProxyConfig, node: NodeView, local_addresses: Collection[IPv4Address]
) -> IptablesSettings:
    """Return the settings of one node.

    Args:
        config: The node's kube-proxy configuration.
        node: Its Node object.
        local_addresses: Every address of the node; only looked at when NodePorts are limited to some.
    """
    options = config.iptables
    own = node_address(config, node)
    gates = config.feature_gates
    return IptablesSettings(
        node=node.name,
        node_ip=own,
        node_labels=node.labels,
        detector=local_detector(config, node),
        masquerade_all=options.masquerade_all,
        masquerade_bit=options.masquerade_bit,
        # upstream switches the option off when no NodePort is to answer on the loopback
        localhost_node_ports=needs_route_localnet(config),
        node_port_ips=_node_port_ips(config, own, local_addresses),
        drops_invalid=not config.conntrack.tcp_be_liberal,
        hints=HintPolicy(
            without_annotation=bool(gates.get("ServiceTrafficDistribution")),
            of_nodes=bool(gates.get("PreferSameTrafficDistribution")),
        ),
    )


def _node_port_ips(
    config: KubeProxyConfig, own: IPv4Address, local_addresses: Collection[IPv4Address]
) -> tuple[IPv4Address, ...] | None:
    networks = [parse_network(entry) for entry in config.node_port_addresses if entry != PRIMARY]
    wanted = [network for network in networks if network is not None]
    if not config.node_port_addresses or any(network.prefixlen == 0 for network in wanted):
        return None
    found = {a for a in local_addresses if any(a in network for network in wanted)}
    if PRIMARY in config.node_port_addresses:
        found.add(own)
    if not config.iptables.localhost_node_ports:
        found = {a for a in found if not a.is_loopback}
    return tuple(sorted(found))


def needs_route_localnet(config: KubeProxyConfig) -> bool:
    """Say whether packets to 127.0.0.1 must be allowed to leave the loopback: NodePorts answer there."""
    if not config.iptables.localhost_node_ports:
        return False
    if not config.node_port_addresses:
        return True
    networks = [parse_network(entry) for entry in config.node_port_addresses if entry != PRIMARY]
    return any(network is not None and network.overlaps(_LOOPBACK) for network in networks)


@dataclass(frozen=True, slots=True)
class ServiceRules:
    """The rules of one service port: lines without line ends, each list in upstream's order."""

    filter_rules: tuple[str, ...]
    nat_dispatch: tuple[str, ...]
    chains: tuple[str, ...]
    nat_rules: tuple[str, ...]
    no_local_endpoints: tuple[bool, bool]  # internal, external: there are endpoints, but none here


class _Matches:
    """The arguments that say where packets come from, once per settings."""

    def __init__(self, detector: LocalDetector | None) -> None:
        self.is_pod = self.is_not_pod = ""
        if detector is not None:
            option = "-s" if detector.origin is Origin.ADDRESS else "-i"
            value = f"{detector.value}+" if detector.origin is Origin.INTERFACE_PREFIX else detector.value
            self.is_pod = f" {option} {value}"
            self.is_not_pod = f" ! {option} {value}"


def render_service(
    service: ServicePort, choice: EndpointChoice, settings: IptablesSettings, *, large: bool = False
) -> ServiceRules:
    """Return the rules of one service port for the endpoints chosen for it.

    ``large`` leaves out the comments of the rules that lead to endpoints and of the endpoints' own.
    """
    name, protocol = str(service.name), service.protocol.tool_name
    suffix = chains.service_suffix(service.name)
    cluster_chain, local_chain = chains.CLUSTER_PREFIX + suffix, chains.LOCAL_PREFIX + suffix
    external_chain, ranges_chain = chains.EXTERNAL_PREFIX + suffix, chains.SOURCE_RANGES_PREFIX + suffix
    internal_local = service.internal_policy is TrafficPolicy.LOCAL
    external_local = service.external_policy is TrafficPolicy.LOCAL
    internal_target = local_chain if internal_local else cluster_chain
    external_target = local_chain if external_local else cluster_chain
    has_internal = bool(choice.local if internal_local else choice.has_any)
    has_external = bool(choice.local if external_local else choice.has_any)
    refusal = ("has no local endpoints", "DROP") if choice.has_any else ("has no endpoints", "REJECT")
    uses_external_chain = choice.has_any and service.is_externally_accessible
    uses_ranges_chain = choice.has_any and bool(service.load_balancer_ips) and bool(service.source_ranges)
    matches = _Matches(settings.detector)
    filter_rules: list[str] = []
    dispatch: list[str] = []
    used: list[str] = []
    nat: list[str] = []

    def to(address: IPv4Address) -> str:
        return f"-m {protocol} -p {protocol} -d {address} --dport {service.port}"

    def refuse(chain: str, match: str) -> None:
        filter_rules.append(f'-A {chain} -m comment --comment "{name} {refusal[0]}" {match} -j {refusal[1]}')

    # Dispatch: which destination leads to which chain.
    if has_internal:
        dispatch.append(
            f'-A {chains.SERVICES} -m comment --comment "{name} cluster IP" {to(service.cluster_ip)} -j {internal_target}'
        )
    else:
        refuse(chains.SERVICES, to(service.cluster_ip))
    for address in service.external_ips:
        if choice.has_any:
            dispatch.append(
                f'-A {chains.SERVICES} -m comment --comment "{name} external IP" {to(address)} -j {external_chain}'
            )
        if not has_external:
            refuse(chains.EXTERNAL_SERVICES, to(address))
    for address in service.load_balancer_ips:
        if choice.has_any:
            target = ranges_chain if uses_ranges_chain else external_chain
            dispatch.append(
                f'-A {chains.SERVICES} -m comment --comment "{name} loadbalancer IP" {to(address)} -j {target}'
            )
        if uses_ranges_chain:
            filter_rules.append(
                f'-A {chains.PROXY_FIREWALL} -m comment --comment "{name} traffic not accepted by {ranges_chain}" '
                f"{to(address)} -j DROP"
            )
    if not has_external:
        for address in service.load_balancer_ips:
            refuse(chains.EXTERNAL_SERVICES, to(address))
    if service.node_port:
        to_node_port = f"-m {protocol} -p {protocol} --dport {service.node_port}"
        if choice.has_any:
            dispatch.append(f"-A {chains.NODE_PORTS} -m comment --comment {name} {to_node_port} -j {external_chain}")
        if not has_external:
            refuse(chains.EXTERNAL_SERVICES, f"-m addrtype --dst-type LOCAL {to_node_port}")
    if service.health_check_node_port:
        filter_rules.append(
            f'-A {chains.NODE_PORTS} -m comment --comment "{name} health check node port" '
            f"-m tcp -p tcp --dport {service.health_check_node_port} -j ACCEPT"
        )

    # Chains of this service port's own.
    if has_internal:
        source = None if settings.masquerade_all else matches.is_not_pod
        if source != "":
            nat.append(
                f'-A {internal_target} -m comment --comment "{name} cluster IP" {to(service.cluster_ip)}{source or ""} '
                f"-j {chains.MARK_MASQ}"
            )
    if uses_external_chain:
        used.append(external_chain)
        nat.extend(_external_rules(name, external_chain, cluster_chain, external_local, matches))
        if has_external:
            nat.append(f"-A {external_chain} -j {external_target}")
    if uses_ranges_chain:
        used.append(ranges_chain)
        nat.extend(_ranges_rules(service, ranges_chain, external_chain, settings.node_ip))
    if choice.cluster:
        used.append(cluster_chain)
        nat.extend(_balancing_rules(service, cluster_chain, choice.cluster, large))
    if choice.local:
        used.append(local_chain)
        nat.extend(_balancing_rules(service, local_chain, choice.local, large))
    for endpoint in choice.reachable:
        endpoint_chain = chains.endpoint_chain(service.name, endpoint.text)
        used.append(endpoint_chain)
        nat.extend(_endpoint_rules(service, endpoint_chain, endpoint, large))
    return ServiceRules(
        filter_rules=tuple(filter_rules),
        nat_dispatch=tuple(dispatch),
        chains=tuple(used),
        nat_rules=tuple(nat),
        no_local_endpoints=(
            choice.has_any and internal_local and not choice.local,
            choice.has_any and external_local and service.is_externally_accessible and not choice.local,
        ),
    )


def _external_rules(name: str, chain: str, cluster_chain: str, local: bool, matches: _Matches) -> Iterable[str]:
    """Yield what happens to packets for an external address before the endpoints are chosen."""
    if not local:
        # Another node's endpoint must answer through this node, which is the one the client talks to.
        yield (
            f'-A {chain} -m comment --comment "masquerade traffic for {name} external destinations" -j {chains.MARK_MASQ}'
        )
        return
    if matches.is_pod:
        # A pod that uses an external address gets what the ClusterIP would give it: every node's endpoints.
        yield (
            f'-A {chain} -m comment --comment "pod traffic for {name} external destinations"{matches.is_pod} '
            f"-j {cluster_chain}"
        )
    for verb, target in (("masquerade", chains.MARK_MASQ), ("route", cluster_chain)):
        yield (
            f'-A {chain} -m comment --comment "{verb} LOCAL traffic for {name} external destinations" '
            f"-m addrtype --src-type LOCAL -j {target}"
        )


def _ranges_rules(service: ServicePort, chain: str, target: str, node_ip: IPv4Address) -> Iterable[str]:
    """Yield the gate of loadBalancerSourceRanges. What it does not admit meets KUBE-PROXY-FIREWALL later."""
    comment = f'-m comment --comment "{service.name} loadbalancer IP"'
    for network in service.source_ranges:
        yield f"-A {chain} {comment} -s {network} -j {target}"
    if any(node_ip in network for network in service.source_ranges):
        # Packets of the node to its own load-balancer address are looped back with that address as their source.
        for address in service.load_balancer_ips:
            yield f"-A {chain} {comment} -s {address} -j {target}"
    yield (
        f'-A {chain} -m comment --comment "other traffic to {service.name} will be dropped by {chains.PROXY_FIREWALL}"'
    )


def split_evenly(n: int) -> list[str]:
    """Return ``--probability`` values that spread traffic evenly over ``n`` endpoints.

    Rules are tried in order, so rule ``i`` must take ``1/(n-i)`` of what reaches it; the last endpoint takes the rest.

    Returns:
        ``n - 1`` fractions in (0, 1), ten decimals, in rule order.

    Raises:
        ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"need at least one endpoint, got {n}")
    return [f"{1 / (n - i):.10f}" for i in range(n - 1)]


def _balancing_rules(service: ServicePort, chain: str, endpoints: Sequence[Endpoint], large: bool) -> Iterable[str]:
    targets = [chains.endpoint_chain(service.name, endpoint.text) for endpoint in endpoints]
    comments = ["" if large else f' -m comment --comment "{service.name} -> {e.text}"' for e in endpoints]
    if service.affinity_timeout_s:
        for target, comment in zip(targets, comments, strict=True):
            yield (
                f"-A {chain}{comment} -m recent --name {target} --rcheck --seconds {service.affinity_timeout_s} --reap "
                f"-j {target}"
            )
    for target, comment, probability in zip(targets, comments, [*split_evenly(len(targets)), ""], strict=True):
        match = f" -m statistic --mode random --probability {probability}" if probability else ""
        yield f"-A {chain}{comment}{match} -j {target}"


def _endpoint_rules(service: ServicePort, chain: str, endpoint: Endpoint, large: bool) -> Iterable[str]:
    comment = "" if large else f" -m comment --comment {service.name}"
    protocol = service.protocol.tool_name
    # Hairpin: a pod that reaches itself must see the node as its peer, or it would answer itself directly.
    yield f"-A {chain}{comment} -s {endpoint.address} -j {chains.MARK_MASQ}"
    recent = f" -m recent --name {chain} --set" if service.affinity_timeout_s else ""
    yield f"-A {chain}{comment}{recent} -m {protocol} -p {protocol} -j DNAT --to-destination {endpoint.text}"


@dataclass(frozen=True, slots=True)
class Installed:
    """What of ours a node has already: its service chains (nat), canaries' tables, and jumps as they are saved."""

    chains: frozenset[str] = frozenset()
    jumps: frozenset[tuple[str, str]] = frozenset()  # (table, saved line)
    canaries: frozenset[str] = frozenset()
    rules: Mapping[str, int] = field(default_factory=dict)  # table -> number of rules in our chains


NOTHING_INSTALLED = Installed()


def parse_installed(saved: str) -> Installed:
    """Read the output of ``iptables-save`` (all tables).

    Sample::

        *nat
        :KUBE-SVC-4SW47YFZTEDKD3PK - [0:0]
        -A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
        COMMIT
    """
    found: set[str] = set()
    jumps: set[tuple[str, str]] = set()
    canaries: set[str] = set()
    wanted = {(jump.table, jump.saved) for jump in JUMPS}
    rules = {"filter": 0, "nat": 0}
    table = ""
    for line in saved.splitlines():
        if line.startswith(":"):
            chain = line[1:].split(" ", 1)[0]
            if chain == chains.CANARY:
                canaries.add(table)
            elif table == "nat" and chain.startswith(chains.SERVICE_PREFIXES):
                found.add(chain)
        elif line.startswith("-A KUBE-"):
            if table in rules:
                rules[table] += 1
        elif line.startswith("-A ") and (table, line.rstrip()) in wanted:
            jumps.add((table, line.rstrip()))
        elif line.startswith("*"):
            table = line[1:].strip()
    return Installed(frozenset(found), frozenset(jumps), frozenset(canaries), rules)


@dataclass(frozen=True, slots=True)
class RestorePayload:
    """Text for one ``iptables-restore --noflush --counters``, and what holds once it is accepted."""

    text: str
    chains: frozenset[str]  # service chains in use
    rules: Mapping[str, int]  # table -> number of rules that should exist, ours only
    no_local_endpoints: tuple[int, int]  # service ports without local endpoints: internal, external policy


def missing_parts(installed: Installed, wanted: RestorePayload) -> str:
    """Return in a few words what differs from the payload once accepted, or ''.

    Upstream looks for its canary chain only, and so overlooks a flush that leaves chains in place (`iptables -F`).
    """
    tables = sorted(set(CANARY_TABLES) - installed.canaries)
    if tables:
        return f"the canary chain is gone from {', '.join(tables)}"
    for jump in JUMPS:
        if (jump.table, jump.saved) not in installed.jumps:
            return f"a jump is gone from {jump.table}: {jump.saved}"
    gone = sorted(wanted.chains - installed.chains)
    if gone:
        return f"{len(gone)} chains are gone, for example {gone[0]}"
    for table, count in wanted.rules.items():
        if installed.rules.get(table, 0) != count:
            return f"{table} has {installed.rules.get(table, 0)} rules in our chains instead of {count}"
    return ""


class IptablesRenderer:
    """Renders payloads and remembers the rules of service ports that did not change. Holds no kernel state."""

    def __init__(self, settings: IptablesSettings) -> None:
        self.settings = settings
        self._cache: dict[ServicePortName, tuple[ServicePort, tuple[Endpoint, ...], bool, ServiceRules]] = {}

    def full(self, state: ProxyState, installed: Installed) -> RestorePayload:
        """Return everything: canaries and missing jumps too, and the removal of service chains not in use."""
        rules = self._rules(state)
        return self._payload(rules, rules.keys(), installed.chains, installed)

    def partial(
        self, state: ProxyState, changed: Collection[ServicePortName], installed_chains: Collection[str]
    ) -> RestorePayload:
        """Return the dispatch of every service port, but the chains of ``changed`` ones only."""
        return self._payload(self._rules(state), changed, installed_chains, None)

    def _rules(self, state: ProxyState) -> dict[ServicePortName, ServiceRules]:
        large = state.endpoint_count > LARGE_CLUSTER_ENDPOINTS
        found: dict[ServicePortName, tuple[ServicePort, tuple[Endpoint, ...], bool, ServiceRules]] = {}
        settings = self.settings
        for name in sorted(state.services):
            service, endpoints = state.services[name], state.endpoints.get(name, ())
            known = self._cache.get(name)
            if known and known[0] is service and known[1] is endpoints and known[2] is large:
                found[name] = known
                continue
            choice = choose_endpoints(service, endpoints, settings.node_labels, settings.node, settings.hints)
            found[name] = (service, endpoints, large, render_service(service, choice, settings, large=large))
        self._cache = found
        return {name: entry[3] for name, entry in found.items()}

    def _payload(
        self,
        rules: Mapping[ServicePortName, ServiceRules],
        written: Collection[ServicePortName],
        installed_chains: Collection[str],
        installed: Installed | None,
    ) -> RestorePayload:
        used = frozenset(chain for entry in rules.values() for chain in entry.chains)
        stale = sorted(set(installed_chains) - used)
        missing = [] if installed is None else [j for j in JUMPS if (j.table, j.saved) not in installed.jumps]
        canaries = set() if installed is None else set(CANARY_TABLES) - installed.canaries
        filter_rules = [line for entry in rules.values() for line in entry.filter_rules]
        filter_rules += self._fixed_filter_rules()
        head, tail = self._fixed_nat_rules()
        dispatch = [line for entry in rules.values() for line in entry.nat_dispatch]
        shown = [entry for name, entry in rules.items() if name in written]
        lines: list[str] = []
        if "mangle" in canaries:
            lines += ["*mangle", _declare(chains.CANARY), "COMMIT"]
        lines.append("*filter")
        lines += map(_declare, _FILTER_CHAINS)
        lines += [_declare(chains.CANARY)] if "filter" in canaries else []
        lines += filter_rules
        # Jumps come after the rules they lead to, and each on top of its chain.
        lines += [f"-I {jump.chain} {jump.rule}" for jump in missing if jump.table == "filter"]
        lines += ["COMMIT", "*nat"]
        lines += map(_declare, _NAT_CHAINS)
        lines += [_declare(chains.CANARY)] if "nat" in canaries else []
        lines += [_declare(chain) for entry in shown for chain in entry.chains]
        lines += map(_declare, stale)  # flushed, so that it refers to nothing and can be deleted
        lines += head
        lines += dispatch
        for entry in shown:
            lines += entry.nat_rules
        lines += tail
        lines += [f"-I {jump.chain} {jump.rule}" for jump in missing if jump.table == "nat"]
        lines += [f"-X {chain}" for chain in stale]
        lines.append("COMMIT")
        nat_count = len(head) + len(tail) + len(dispatch) + sum(len(entry.nat_rules) for entry in rules.values())
        return RestorePayload(
            text="\n".join(lines) + "\n",
            chains=used,
            rules={"filter": len(filter_rules), "nat": nat_count},
            no_local_endpoints=(
                sum(entry.no_local_endpoints[0] for entry in rules.values()),
                sum(entry.no_local_endpoints[1] for entry in rules.values()),
            ),
        )

    def _fixed_filter_rules(self) -> list[str]:
        mark = self.settings.mark
        rules = []
        if self.settings.localhost_node_ports:
            # route_localnet lets packets from outside reach 127.0.0.1; this takes that back (CVE-2020-8558).
            rules.append(
                f'-A {chains.FIREWALL} -m comment --comment "block incoming localnet connections" -d 127.0.0.0/8 '
                "! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
            )
        if self.settings.drops_invalid:
            # A packet conntrack cannot place would leave untranslated, with a pod's address (kubernetes issue 74839).
            rules.append(f"-A {chains.FORWARD} -m conntrack --ctstate INVALID -j DROP")
        rules.append(
            f'-A {chains.FORWARD} -m comment --comment "kubernetes forwarding rules" -m mark --mark {mark}/{mark} -j ACCEPT'
        )
        rules.append(
            f'-A {chains.FORWARD} -m comment --comment "kubernetes forwarding conntrack rule" '
            "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
        )
        return rules

    def _fixed_nat_rules(self) -> tuple[list[str], list[str]]:
        """Return the masquerading rules, and the last rules of KUBE-SERVICES."""
        settings, mark = self.settings, self.settings.mark
        head = [
            f"-A {chains.POSTROUTING} -m mark ! --mark {mark}/{mark} -j RETURN",
            # Cleared at once, so that a packet that passes here again (through a tunnel, say) is not translated twice.
            f"-A {chains.POSTROUTING} -j MARK --xor-mark {mark}",
            f'-A {chains.POSTROUTING} -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE'
            + (" --random-fully" if settings.random_fully else ""),
            f"-A {chains.MARK_MASQ} -j MARK --or-mark {mark}",
        ]
        comment = f"-A {chains.SERVICES} -m comment --comment {_LAST_COMMENT}"
        if settings.node_port_ips is not None:
            return head, [f"{comment} -d {address} -j {chains.NODE_PORTS}" for address in settings.node_port_ips]
        loopback = "" if settings.localhost_node_ports else " ! -d 127.0.0.0/8"
        return head, [f"{comment} -m addrtype --dst-type LOCAL{loopback} -j {chains.NODE_PORTS}"]


def _declare(chain: str) -> str:
    return f":{chain} - [0:0]"  # declaring a chain empties it


def render_full(
    state: ProxyState,
    settings: IptablesSettings,
    installed: Installed = NOTHING_INSTALLED,
) -> RestorePayload:
    """Return the whole of what ``settings`` and ``state`` ask for, given what the node has already."""
    return IptablesRenderer(settings).full(state, installed)
