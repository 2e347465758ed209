"""The fixed part of ipvs mode: the ipsets, and the iptables rules that look into them. Pure.

::

    PREROUTING, OUTPUT (nat)  KUBE-SERVICES ─┬─ KUBE-LOAD-BALANCER ─┬─ KUBE-MARK-MASQ
                                             ├─ KUBE-NODE-PORT ─────┤
                                             └─ ClusterIPs ─────────┘
    INPUT (filter)            KUBE-PROXY-FIREWALL ─ KUBE-SOURCE-RANGES-FIREWALL   load-balancer source ranges
                              KUBE-IPVS-FILTER                                    other ports of bound addresses: refused
    LOCAL_IN, LOCAL_OUT       IPVS chooses the real server
    POSTROUTING (nat)         KUBE-POSTROUTING masquerades hairpins and what is marked

No rule is about one Service (but for KUBE-IPVS-OUT-FILTER): Services are members of sets. So the rules change only when a
set gets its first member or loses its last.

Source: kubernetes pkg/proxy/ipvs/{proxier,ipset}.go, writeIptablesRules (v1.30).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from testbed.dataplane import chains
from testbed.dataplane.iptables import Jump, saved_form
from testbed.dataplane.iptables_saved import parse_saved
from testbed.model.proxyconfig import LocalDetector, Origin

DEVICE: Final = "kube-ipvs0"

LOOP_BACK: Final = "KUBE-LOOP-BACK"
CLUSTER_IP: Final = "KUBE-CLUSTER-IP"
EXTERNAL_IP: Final = "KUBE-EXTERNAL-IP"
EXTERNAL_IP_LOCAL: Final = "KUBE-EXTERNAL-IP-LOCAL"
LOAD_BALANCER: Final = "KUBE-LOAD-BALANCER"
LOAD_BALANCER_LOCAL: Final = "KUBE-LOAD-BALANCER-LOCAL"
LOAD_BALANCER_FIREWALL: Final = "KUBE-LOAD-BALANCER-FW"
SOURCE_CIDR: Final = "KUBE-LOAD-BALANCER-SOURCE-CIDR"
SOURCE_IP: Final = "KUBE-LOAD-BALANCER-SOURCE-IP"
NODE_PORT: Final[Mapping[str, str]] = {
    "tcp": "KUBE-NODE-PORT-TCP", "udp": "KUBE-NODE-PORT-UDP", "sctp": "KUBE-NODE-PORT-SCTP-HASH",
}  # fmt: skip
NODE_PORT_LOCAL: Final[Mapping[str, str]] = {
    "tcp": "KUBE-NODE-PORT-LOCAL-TCP", "udp": "KUBE-NODE-PORT-LOCAL-UDP", "sctp": "KUBE-NODE-PORT-LOCAL-SCTP-HASH",
}  # fmt: skip
HEALTH_CHECK: Final = "KUBE-HEALTH-CHECK-NODE-PORT"
BOUND: Final = "KUBE-IPVS-IPS"

#: Every set with its type. ``ipset save`` prints hash types and bitmaps with the options below.
SETS: Final[Mapping[str, str]] = {
    LOOP_BACK: "hash:ip,port,ip",
    CLUSTER_IP: "hash:ip,port",
    EXTERNAL_IP: "hash:ip,port",
    EXTERNAL_IP_LOCAL: "hash:ip,port",
    LOAD_BALANCER: "hash:ip,port",
    LOAD_BALANCER_LOCAL: "hash:ip,port",
    LOAD_BALANCER_FIREWALL: "hash:ip,port",
    SOURCE_CIDR: "hash:ip,port,net",
    SOURCE_IP: "hash:ip,port,ip",
    NODE_PORT["tcp"]: "bitmap:port",
    NODE_PORT_LOCAL["tcp"]: "bitmap:port",
    NODE_PORT["udp"]: "bitmap:port",
    NODE_PORT_LOCAL["udp"]: "bitmap:port",
    NODE_PORT["sctp"]: "hash:ip,port",
    NODE_PORT_LOCAL["sctp"]: "hash:ip,port",
    HEALTH_CHECK: "bitmap:port",
    BOUND: "hash:ip",
}
HASH_OPTIONS: Final = "family inet hashsize 1024 maxelem 65536"
BITMAP_OPTIONS: Final = "range 0-65535"

#: The comment of the rules that look into a set.
COMMENTS: Final[Mapping[str, str]] = {
    LOOP_BACK: "Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose",
    CLUSTER_IP: "Kubernetes service cluster ip + port for masquerade purpose",
    EXTERNAL_IP: "Kubernetes service external ip + port for masquerade and filter purpose",
    EXTERNAL_IP_LOCAL: "Kubernetes service external ip + port with externalTrafficPolicy=local",
    LOAD_BALANCER: "Kubernetes service lb portal",
    LOAD_BALANCER_LOCAL: "Kubernetes service load balancer ip + port with externalTrafficPolicy=local",
    LOAD_BALANCER_FIREWALL: "Kubernetes service load balancer ip + port for load balancer with sourceRange",
    SOURCE_CIDR: "Kubernetes service load balancer ip + port + source cidr for packet filter purpose",
    SOURCE_IP: "Kubernetes service load balancer ip + port + source IP for packet filter purpose",
    NODE_PORT["tcp"]: "Kubernetes nodeport TCP port for masquerade purpose",
    NODE_PORT_LOCAL["tcp"]: "Kubernetes nodeport TCP port with externalTrafficPolicy=local",
    NODE_PORT["udp"]: "Kubernetes nodeport UDP port for masquerade purpose",
    NODE_PORT_LOCAL["udp"]: "Kubernetes nodeport UDP port with externalTrafficPolicy=local",
    NODE_PORT["sctp"]: "Kubernetes nodeport SCTP port for masquerade purpose with type 'hash ip:port'",
    NODE_PORT_LOCAL["sctp"]: "Kubernetes nodeport SCTP port with externalTrafficPolicy=local with type 'hash ip:port'",
    HEALTH_CHECK: "Kubernetes health check node port",
}

_NODE_PORT_CHAIN: Final = "KUBE-NODE-PORT"
_BALANCER_CHAIN: Final = "KUBE-LOAD-BALANCER"
_RANGES_CHAIN: Final = "KUBE-SOURCE-RANGES-FIREWALL"
_FILTER_CHAIN: Final = "KUBE-IPVS-FILTER"
OUT_FILTER_CHAIN: Final = "KUBE-IPVS-OUT-FILTER"

CHAINS: Final[Mapping[str, tuple[str, ...]]] = {
    "nat": (chains.SERVICES, chains.POSTROUTING, _NODE_PORT_CHAIN, _BALANCER_CHAIN, chains.MARK_MASQ),
    "filter": (
        chains.FORWARD, _NODE_PORT_CHAIN, chains.PROXY_FIREWALL, _RANGES_CHAIN, _FILTER_CHAIN, OUT_FILTER_CHAIN,
    ),
}  # fmt: skip


def _jump(table: str, chain: str, target: str, comment: str) -> Jump:
    return Jump(table, chain, f'-m comment --comment "{comment}" -j {target}')


#: In the order in which they are inserted, each on top of its chain: the last one ends up first.
JUMPS: Final[tuple[Jump, ...]] = (
    _jump("nat", "OUTPUT", chains.SERVICES, "kubernetes service portals"),
    _jump("nat", "PREROUTING", chains.SERVICES, "kubernetes service portals"),
    _jump("nat", "POSTROUTING", chains.POSTROUTING, "kubernetes postrouting rules"),
    _jump("filter", "FORWARD", chains.FORWARD, "kubernetes forwarding rules"),
    _jump("filter", "INPUT", _NODE_PORT_CHAIN, "kubernetes health check rules"),
    _jump("filter", "INPUT", chains.PROXY_FIREWALL, "kube-proxy firewall rules"),
    _jump("filter", "FORWARD", chains.PROXY_FIREWALL, "kube-proxy firewall rules"),
    _jump("filter", "INPUT", _FILTER_CHAIN, "kubernetes ipvs access filter"),
    _jump("filter", "OUTPUT", OUT_FILTER_CHAIN, "kubernetes ipvs access filter"),
)

#: The chains of KUBE-IPVS-FILTER's exceptions: what KUBE-PROXY-FIREWALL and the sets let in.
_LET_IN: Final = (
    (LOAD_BALANCER, "dst,dst"), (CLUSTER_IP, "dst,dst"), (EXTERNAL_IP, "dst,dst"), (EXTERNAL_IP_LOCAL, "dst,dst"),
    (HEALTH_CHECK, "dst"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class IpvsRuleSettings:
    """What the iptables rules depend on beside the sets."""

    detector: LocalDetector | None = None
    masquerade_all: bool = False
    mark: str = "0x00004000"
    random_fully: bool = True


def render_rules(
    settings: IpvsRuleSettings, used: Collection[str], out_filter: Sequence[str] = ()
) -> dict[str, dict[str, list[str]]]:
    """Return table -> chain -> rules, each chain in upstream's order.

    Args:
        settings: The node's.
        used: The sets that have members.
        out_filter: The rules of KUBE-IPVS-OUT-FILTER: load-balancer addresses this node itself may not use.
    """
    nat: dict[str, list[str]] = {chain: [] for chain in CHAINS["nat"]}
    filtered: dict[str, list[str]] = {chain: [] for chain in CHAINS["filter"]}

    def add(chain: str, rule: str, table: dict[str, list[str]] = nat) -> None:
        table[chain].append(f"-A {chain} {rule}")

    # Clients of the loopback are never marked: their packets could not come back.
    add(chains.SERVICES, "-s 127.0.0.0/8 -j RETURN")
    if LOOP_BACK in used:
        add(chains.POSTROUTING, f"{looks_into(LOOP_BACK, 'dst,dst,src')} -j MASQUERADE")
    if LOAD_BALANCER in used:
        add(chains.SERVICES, f"{looks_into(LOAD_BALANCER)} -j {_BALANCER_CHAIN}")
    if LOAD_BALANCER_LOCAL in used:
        add(_BALANCER_CHAIN, f"{looks_into(LOAD_BALANCER_LOCAL)} -j RETURN")
    for protocol, name in NODE_PORT.items():
        sides = "dst,dst" if protocol == "sctp" else "dst"
        local = NODE_PORT_LOCAL[protocol]
        if local in used:
            add(_NODE_PORT_CHAIN, f"-p {protocol} {looks_into(local, sides)} -j RETURN")
        if name in used:
            add(_NODE_PORT_CHAIN, f"-p {protocol} {looks_into(name, sides)} -j {chains.MARK_MASQ}")
    if CLUSTER_IP in used:
        add(chains.SERVICES, f"{_from_elsewhere(settings)} -j {chains.MARK_MASQ}")
    for name in (EXTERNAL_IP, EXTERNAL_IP_LOCAL):
        if name in used:
            if name == EXTERNAL_IP:
                add(chains.SERVICES, f"{looks_into(name)} -j {chains.MARK_MASQ}")
            # Neither bridged (from a pod) nor the node's own: from outside.
            from_outside = "-m physdev ! --physdev-is-in -m addrtype ! --src-type LOCAL"
            add(chains.SERVICES, f"{looks_into(name)} {from_outside} -j ACCEPT")
            add(chains.SERVICES, f"{looks_into(name)} -m addrtype --dst-type LOCAL -j ACCEPT")
    add(chains.SERVICES, f"-m addrtype --dst-type LOCAL -j {_NODE_PORT_CHAIN}")
    add(_BALANCER_CHAIN, f"-j {chains.MARK_MASQ}")
    for name in (CLUSTER_IP, LOAD_BALANCER):
        if name in used:
            add(chains.SERVICES, f"-m set --match-set {name} dst,dst -j ACCEPT")
    mark = settings.mark
    add(chains.POSTROUTING, f"-m mark ! --mark {mark}/{mark} -j RETURN")
    add(chains.POSTROUTING, f"-j MARK --xor-mark {mark}")
    add(
        chains.POSTROUTING,
        '-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE'
        + (" --random-fully" if settings.random_fully else ""),
    )
    add(chains.MARK_MASQ, f"-j MARK --or-mark {mark}")

    firewall = [
        (LOAD_BALANCER_FIREWALL, chains.PROXY_FIREWALL, "dst,dst", _RANGES_CHAIN),
        (SOURCE_CIDR, _RANGES_CHAIN, "dst,dst,src", "RETURN"),
        (SOURCE_IP, _RANGES_CHAIN, "dst,dst,src", "RETURN"),
    ]
    for name, chain, sides, target in firewall:
        if name in used:
            add(chain, f"{looks_into(name, sides)} -j {target}", filtered)
    add(_RANGES_CHAIN, "-j DROP", filtered)
    filtered[OUT_FILTER_CHAIN] += out_filter
    forwarding = '-m comment --comment "kubernetes forwarding'
    add(chains.FORWARD, f'{forwarding} rules" -m mark --mark {mark}/{mark} -j ACCEPT', filtered)
    add(chains.FORWARD, f'{forwarding} conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT', filtered)
    add(_NODE_PORT_CHAIN, f"{looks_into(HEALTH_CHECK, 'dst')} -j ACCEPT", filtered)
    for name, sides in _LET_IN:
        add(_FILTER_CHAIN, f"-m set --match-set {name} {sides} -j RETURN", filtered)
    # A bound address is local: without this its other ports would be the node's own, its SSH server among them.
    add(_FILTER_CHAIN, f"-m conntrack --ctstate NEW -m set --match-set {BOUND} dst -j REJECT", filtered)
    return {"nat": nat, "filter": filtered}


def looks_into(name: str, sides: str = "dst,dst") -> str:
    """Return the match of a set: ``sides`` says what of the packet is looked up."""
    return f'-m comment --comment "{COMMENTS[name]}" -m set --match-set {name} {sides}'


def _from_elsewhere(settings: IpvsRuleSettings) -> str:
    """Return the match of packets to ClusterIPs that must be masqueraded."""
    sides, match = "dst,dst", ""
    detector = settings.detector
    if not settings.masquerade_all:
        if detector is None:
            # Only what comes from a virtual address: a node's own packet to its own ClusterIP.
            sides = "src,dst"
        else:
            option = "-s" if detector.origin is Origin.ADDRESS else "-i"
            match = f" ! {option} {detector.value}{'+' if detector.origin is Origin.INTERFACE_PREFIX else ''}"
    return looks_into(CLUSTER_IP, sides) + match


def out_filter_rule(address: str, protocol: str, port: int) -> str:
    """Return the rule that keeps the node itself from a load-balancer address whose source ranges leave the node out."""
    return f"-A {OUT_FILTER_CHAIN} -s {address} -m ipvs --vaddr {address} --vproto {protocol} --vport {port} -j DROP"


@dataclass(frozen=True, slots=True)
class InstalledRules:
    """What of ours `iptables-save` printed: our chains with their rules, and our jumps."""

    chains: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    jumps: frozenset[tuple[str, str]] = frozenset()


def parse_installed_rules(saved: str) -> InstalledRules:
    """Read the output of ``iptables-save`` (all tables)."""
    return InstalledRules(*parse_saved(saved, CHAINS, [(jump.table, jump.saved) for jump in JUMPS]))


_NUMBERS: Final = {"tcp": "6", "udp": "17", "sctp": "132"}
_VIRTUAL = re.compile(r"-m ipvs --vaddr (\S+) --vproto (\w+)")


def saved_rule(line: str) -> str:
    """Return a rule as ``iptables-save`` prints it (1.8.9)."""
    line = saved_form(line)
    # the ipvs match prints the protocol's number, and in an order of its own
    return _VIRTUAL.sub(lambda m: f"-m ipvs --vproto {_NUMBERS.get(m[2], m[2])} --vaddr {m[1]}", line)


def render_payload(rules: Mapping[str, Mapping[str, Sequence[str]]], jumps: Iterable[Jump] = JUMPS) -> str:
    """Return the text for one ``iptables-restore --noflush``: nat, then filter, every chain written whole."""
    lines: list[str] = []
    wanted = list(jumps)
    for table, in_chains in rules.items():
        lines.append(f"*{table}")
        lines += [f":{chain} - [0:0]" for chain in in_chains]
        lines += [rule for own in in_chains.values() for rule in own]
        lines += [f"-I {jump.chain} {jump.rule}" for jump in wanted if jump.table == table]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def find_rule_damage(rules: Mapping[str, Mapping[str, Sequence[str]]], installed: InstalledRules) -> str:
    """Return in a few words what of these rules a node does not have as they were written, or ''."""
    for jump in JUMPS:
        if (jump.table, jump.saved) not in installed.jumps:
            return f"a jump is gone from {jump.table}: {jump.saved}"
    for table, in_chains in rules.items():
        for chain, own in in_chains.items():
            there = installed.chains.get((table, chain))
            if there is None:
                return f"the chain {chain} of {table} is gone"
            wanted = [saved_rule(rule) for rule in own]
            same = sorted(there) == sorted(wanted) if chain == OUT_FILTER_CHAIN else list(there) == wanted
            if not same:
                other = f"{len(there)} rules instead of {len(own)}" if len(there) != len(own) else "other rules"
                return f"{chain} of {table} has {other}"
    return ""


def missing_jumps(installed: InstalledRules) -> tuple[Jump, ...]:
    """Return the jumps to insert, in their order."""
    return tuple(jump for jump in JUMPS if (jump.table, jump.saved) not in installed.jumps)


def render_rules_cleanup(installed: InstalledRules) -> str:
    """Return the payload that removes the rules, as ``kube-proxy --cleanup`` does: KUBE-MARK-MASQ stays, others use it."""
    lines: list[str] = []
    for table in CHAINS:
        gone = [chain for where, chain in installed.chains if where == table and chain != chains.MARK_MASQ]
        jumps = [jump for jump in JUMPS if jump.table == table and (table, jump.saved) in installed.jumps]
        if gone or jumps:
            lines += [f"*{table}", *(f":{chain} - [0:0]" for chain in gone)]
            lines += [f"-D {jump.chain} {jump.rule}" for jump in jumps]
            lines += [*(f"-X {chain}" for chain in gone), "COMMIT"]
    return "\n".join(lines) + "\n" if lines else ""
