"""The rules of kube-proxy's userspace mode: they lead what goes to a Service to a port that kube-proxy listens on.

::

    nat PREROUTING  first  KUBE-PORTALS-CONTAINER ── REDIRECT to the proxy port     ClusterIPs, external and balancer IPs
                    last   KUBE-NODEPORT-CONTAINER ─ REDIRECT                       NodePorts, on the node's addresses
    nat OUTPUT      first  KUBE-PORTALS-HOST ─────── DNAT to the node's address     the same, for what the node sends:
                    last   KUBE-NODEPORT-HOST ────── DNAT                           REDIRECT would lead to the loopback there
    filter INPUT    first  KUBE-NODEPORT-NON-LOCAL ─ ACCEPT                         past a default of DROP

Rules are written as ``iptables-save`` prints them, so what is wanted and what is there are compared as text.

Source: kubernetes pkg/proxy/userspace/proxier.go (v1.17).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final, NamedTuple

from testbed.dataplane.balancer import balanced_endpoints
from testbed.dataplane.iptables_saved import parse_saved
from testbed.dataplane.state import ProxyState
from testbed.dataplane.trace import Fate, Node, Packet, Ruleset, Verdict, trace
from testbed.model.proxyconfig import KubeProxyConfig, node_address
from testbed.model.service import Endpoint, NodeView, Protocol, ServicePort, ServicePortName, parse_address

CONTAINER_PORTALS: Final = "KUBE-PORTALS-CONTAINER"
HOST_PORTALS: Final = "KUBE-PORTALS-HOST"
CONTAINER_NODE_PORTS: Final = "KUBE-NODEPORT-CONTAINER"
HOST_NODE_PORTS: Final = "KUBE-NODEPORT-HOST"
NON_LOCAL_NODE_PORTS: Final = "KUBE-NODEPORT-NON-LOCAL"

#: In the order in which upstream makes them.
CHAINS: Final[Mapping[str, tuple[str, ...]]] = {
    "filter": (NON_LOCAL_NODE_PORTS,),
    "nat": (CONTAINER_PORTALS, HOST_PORTALS, CONTAINER_NODE_PORTS, HOST_NODE_PORTS),
}

_ALL_ADDRESSES = IPv4Address("0.0.0.0")
_CLUSTER_IPS = '-m comment --comment "handle ClusterIPs; NOTE: this must be before the NodePort rules"'
_NODE_PORTS = (
    "-m addrtype --dst-type LOCAL "
    '-m comment --comment "handle service NodePorts; NOTE: this must be the last rule in the chain"'
)
_NON_LOCAL = '-m comment --comment "Ensure that non-local NodePort traffic can flow"'


class Hook(NamedTuple):
    """A rule of a built-in chain that leads into ours, on top of it or at its end."""

    table: str
    chain: str
    rule: str
    on_top: bool


HOOKS: Final[tuple[Hook, ...]] = (
    Hook("filter", "INPUT", f"{_NON_LOCAL} -j {NON_LOCAL_NODE_PORTS}", True),
    Hook("nat", "PREROUTING", f"{_CLUSTER_IPS} -j {CONTAINER_PORTALS}", True),
    Hook("nat", "OUTPUT", f"{_CLUSTER_IPS} -j {HOST_PORTALS}", True),
    Hook("nat", "PREROUTING", f"{_NODE_PORTS} -j {CONTAINER_NODE_PORTS}", False),
    Hook("nat", "OUTPUT", f"{_NODE_PORTS} -j {HOST_NODE_PORTS}", False),
)


class Rule(NamedTuple):
    """A rule of one of our chains; ``line`` is ``-A CHAIN …``, as saved."""

    table: str
    line: str


class Portal(NamedTuple):
    """An address and port that a service port is reached at. ``is_external``: an external IP, which others may own."""

    address: IPv4Address
    port: int
    is_external: bool


@dataclass(frozen=True, slots=True)
class UserspaceSettings:
    """What the rules of a node depend on beside its Services."""

    node_ip: IPv4Address
    listen_ip: IPv4Address  # 0.0.0.0: proxy ports are open on all addresses


def make_userspace_settings(config: KubeProxyConfig, node: NodeView) -> UserspaceSettings:
    """Return the settings of a node: bindAddress is where proxy ports listen."""
    return UserspaceSettings(node_address(config, node), parse_address(config.bind_address) or _ALL_ADDRESSES)


def portals_of(service: ServicePort) -> Iterator[Portal]:
    """Yield where a service port is reached, but for its NodePort, in the order in which rules are written."""
    yield Portal(service.cluster_ip, service.port, False)
    for address in service.external_ips:
        yield Portal(address, service.port, True)
    for address in service.load_balancer_ips:
        yield Portal(address, service.port, False)


def keeps_proxy_port(old: ServicePort, new: ServicePort) -> bool:
    """Say whether a service port that was changed goes on at its proxy port; otherwise it gets another one.

    Source: kubernetes pkg/proxy/userspace/proxier.go, sameConfig (v1.25).
    """
    return _configuration(old) == _configuration(new)


def _configuration(service: ServicePort) -> tuple[object, ...]:
    return (
        service.protocol, service.port, service.node_port, service.cluster_ip, service.external_ips,
        service.load_balancer_ips, service.affinity_timeout_s > 0,
    )  # fmt: skip


def render_portal(
    service: ServicePort, portal: Portal, proxy_port: int | str, settings: UserspaceSettings
) -> list[Rule]:
    """Return the rules of one portal of a service port."""
    match = _match(service, portal.port, f"-d {portal.address}/32 ")
    into, onto = _redirect(proxy_port, settings), _dnat(proxy_port, settings)
    if portal.is_external:
        # From outside as it comes in; from pods behind a bridge only when the address is the node's own.
        return [
            Rule("nat", f"-A {CONTAINER_PORTALS} {match} -m physdev ! --physdev-is-in -j {into}"),
            Rule("nat", f"-A {CONTAINER_PORTALS} {match} -m addrtype --dst-type LOCAL -j {into}"),
            Rule("nat", f"-A {HOST_PORTALS} {match} -m addrtype --dst-type LOCAL -j {onto}"),
        ]
    return [
        Rule("nat", f"-A {CONTAINER_PORTALS} {match} -j {into}"),
        Rule("nat", f"-A {HOST_PORTALS} {match} -j {onto}"),
    ]


def render_node_port(service: ServicePort, proxy_port: int | str, settings: UserspaceSettings) -> list[Rule]:
    """Return the rules of a service port's NodePort; none when it has none."""
    if not service.node_port:
        return []
    match = _match(service, service.node_port)
    return [
        Rule("nat", f"-A {CONTAINER_NODE_PORTS} {match} -j {_redirect(proxy_port, settings)}"),
        Rule("nat", f"-A {HOST_NODE_PORTS} {match} -j {_dnat(proxy_port, settings)}"),
        Rule("filter", f"-A {NON_LOCAL_NODE_PORTS} {_match(service, proxy_port)} -m state --state NEW -j ACCEPT"),
    ]


def _match(service: ServicePort, port: int | str, destination: str = "") -> str:
    protocol = service.protocol.tool_name
    return f'{destination}-p {protocol} -m comment --comment "{service.name}" -m {protocol} --dport {port}'


def _redirect(proxy_port: int | str, settings: UserspaceSettings) -> str:
    if settings.listen_ip == _ALL_ADDRESSES:
        return f"REDIRECT --to-ports {proxy_port}"
    return f"DNAT --to-destination {settings.listen_ip}:{proxy_port}"


def _dnat(proxy_port: int | str, settings: UserspaceSettings) -> str:
    address = settings.node_ip if settings.listen_ip == _ALL_ADDRESSES else settings.listen_ip
    return f"DNAT --to-destination {address}:{proxy_port}"


def render_rules(service: ServicePort, proxy_port: int | str, settings: UserspaceSettings) -> list[Rule]:
    """Return all rules of a service port, in the order in which upstream writes them."""
    found = [rule for portal in portals_of(service) for rule in render_portal(service, portal, proxy_port, settings)]
    return found + render_node_port(service, proxy_port, settings)


# --- what is there, and what is to be done about it ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Installed:
    """What of ours a node has: the rules of our chains, and of built-in chains those that lead there."""

    chains: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)  # (table, chain) -> saved lines
    hooks: frozenset[tuple[str, str]] = frozenset()  # (table, saved line)

    @property
    def is_empty(self) -> bool:
        return not self.chains and not self.hooks


NOTHING_INSTALLED: Final = Installed()


def parse_installed(saved: str) -> Installed:
    """Read the output of ``iptables-save`` (all tables)."""
    return Installed(*parse_saved(saved, CHAINS, [(hook.table, f"-A {hook.chain} {hook.rule}") for hook in HOOKS]))


def render_start(installed: Installed) -> str:
    """Return the payload that makes our chains, empty, and the rules that lead there."""
    blocks: dict[str, list[str]] = {}
    for table, chains in CHAINS.items():
        blocks[table] = [f":{chain} - [0:0]" for chain in chains]  # declaring a chain empties it
    for hook in HOOKS:
        if (hook.table, f"-A {hook.chain} {hook.rule}") not in installed.hooks:
            blocks[hook.table].append(f"{'-I' if hook.on_top else '-A'} {hook.chain} {hook.rule}")
    return _payload(blocks)


def render_changes(remove: Iterable[Rule], add: Iterable[Rule]) -> str:
    """Return the payload that deletes rules one by one, and appends others; '' when there are none."""
    blocks: dict[str, list[str]] = {}
    for rule in remove:
        blocks.setdefault(rule.table, []).append(f"-D{rule.line[2:]}")
    for rule in add:
        blocks.setdefault(rule.table, []).append(rule.line)
    return _payload(blocks)


def render_cleanup(installed: Installed) -> str:
    """Return the payload that removes all of userspace mode; '' when there is nothing of it."""
    blocks: dict[str, list[str]] = {}
    for hook in HOOKS:
        if (hook.table, f"-A {hook.chain} {hook.rule}") in installed.hooks:
            blocks.setdefault(hook.table, []).append(f"-D {hook.chain} {hook.rule}")
    heads = {table: [f":{chain} - [0:0]" for where, chain in installed.chains if where == table] for table in CHAINS}
    for table, chain in installed.chains:
        blocks.setdefault(table, []).append(f"-X {chain}")
    return _payload({table: heads.get(table, []) + lines for table, lines in blocks.items()})


def _payload(blocks: Mapping[str, Sequence[str]]) -> str:
    return "".join(
        "\n".join([f"*{table}", *blocks[table], "COMMIT", ""]) for table in ("filter", "nat") if blocks.get(table)
    )


def plan_repair(wanted: Iterable[Rule], installed: Installed) -> tuple[list[Rule], list[Rule]]:
    """Return the rules to delete and to append, so that our chains hold what is wanted; what is right stays where it is."""
    there = Counter(Rule(table, line) for (table, _), lines in installed.chains.items() for line in lines)
    want = Counter(wanted)
    return list((there - want).elements()), list((want - there).elements())


def find_damage(wanted: Iterable[Rule], installed: Installed) -> str:
    """Return in a few words what is not in the kernel as it was put there, or ''."""
    for hook in HOOKS:
        if (hook.table, f"-A {hook.chain} {hook.rule}") not in installed.hooks:
            return f"a jump is gone from {hook.table}: -A {hook.chain} {hook.rule}"
    gone = [chain for table, chains in CHAINS.items() for chain in chains if (table, chain) not in installed.chains]
    if gone:
        return f"the chain {gone[0]} is gone"
    surplus, missing = plan_repair(wanted, installed)
    for rules, what in ((missing, "gone"), (surplus, "not ours")):
        if rules:
            others = f", and {len(rules) - 1} more" if len(rules) > 1 else ""
            return f"a rule of {rules[0].table} is {what}: {rules[0].line}{others}"
    return ""


# --- without a kube-proxy that runs ----------------------------------------------------------------------------------


def is_supported(service: ServicePort) -> bool:
    """Say whether userspace mode can serve a service port: it copies TCP and UDP."""
    return service.protocol is not Protocol.SCTP


def render_node(state: ProxyState, settings: UserspaceSettings, ports: Mapping[ServicePortName, int | str]) -> str:
    """Return the payload for a node that has nothing yet: the start, and the rules of all service ports by name."""
    rules = [
        rule
        for name in sorted(state.services)
        if name in ports
        for rule in render_rules(state.services[name], ports[name], settings)
    ]
    start = parse_blocks(render_start(NOTHING_INSTALLED))
    for rule in rules:
        start[rule.table].append(rule.line)
    return _payload(start)


def parse_blocks(payload: str) -> dict[str, list[str]]:
    """Return the lines of each table of a payload."""
    blocks: dict[str, list[str]] = {}
    table = ""
    for line in payload.splitlines():
        if line.startswith("*"):
            table = line[1:]
            blocks[table] = []
        elif line != "COMMIT":
            blocks[table].append(line)
    return blocks


def stand_in_ports(state: ProxyState, first: int = 0) -> dict[ServicePortName, int | str]:
    """Return a port for each service port by name: from ``first`` on, or (0) a word that stands for what the kernel chooses."""
    names = [name for name in sorted(state.services) if is_supported(state.services[name])]
    return {name: first + index if first else f"<proxy port of {name}>" for index, name in enumerate(names)}


def trace_userspace(
    rules: Ruleset, packet: Packet, node: Node, state: ProxyState, ports: Mapping[int, ServicePortName]
) -> Fate:
    """Return the fate of a packet: the endpoints that its connection is copied to, in turn, if it gets to a proxy port.

    The endpoint sees an address of the node. Without endpoints the connection is accepted, and closed at once.

    Raises:
        ValueError: the ways out disagree in kind.
    """
    fate = trace(rules, packet, node)
    if fate.verdict is not Verdict.ENDPOINT:
        return fate
    [place] = fate.endpoints  # chance has no part in these rules
    name = ports[int(place.rpartition(":")[2])]
    endpoints = tuple(sorted(balanced_endpoints(state.endpoints.get(name, ()))))
    if not endpoints:
        return Fate(Verdict.CLOSED, (), False, fate.rules)
    return Fate(Verdict.ENDPOINT, endpoints, True, fate.rules)


def answering_state(
    state: ProxyState, ports: Mapping[ServicePortName, int], local_addresses: Collection[IPv4Address]
) -> ProxyState:
    """Return a state whose endpoints are the proxy ports: who answers, as connection tracking sees it."""
    endpoints = {
        name: tuple(Endpoint(address=address, port=port) for address in local_addresses)
        for name, port in ports.items()
        if name.protocol == Protocol.UDP.value
    }
    return ProxyState(services=state.services, endpoints=endpoints)
