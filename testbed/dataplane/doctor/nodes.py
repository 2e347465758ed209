"""Faults of nodes: gone, cut off, settings that packets depend on, and what kube-proxy keeps in the kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from testbed.dataplane.doctor.finding import Finding, listed
from testbed.dataplane.doctor.observations import ClusterSeen, NodeSeen
from testbed.dataplane.doctor.rules import RuleDamage, find_damage, proxy_state
from testbed.dataplane.flows import stale_udp_flows
from testbed.dataplane.state import ProxyState
from testbed.model.objects import Object, name_of
from testbed.model.topology import NodeSpec

BRIDGE_SETTING = "net/bridge/bridge-nf-call-iptables"
FORWARD_SETTING = "net/ipv4/ip_forward"
_STRICT = "1"  # of rp_filter; 2 is loose
_NEARLY_FULL = 0.95
_RESTART_PROXY = "kubectl -n kube-system rollout restart daemonset kube-proxy"


def find_node_faults(seen: ClusterSeen) -> Iterator[Finding]:
    """Go through the nodes; of one that is lost nothing else is said."""
    objects = {name_of(node): node for node in seen.list("nodes")}
    alive = []
    for spec in seen.topology.nodes:
        inside = seen.nodes_seen.get(spec.name)
        node = objects.get(spec.name)
        if inside is None or node is None:
            continue
        if gone := _why_lost(spec, node, inside):
            yield gone
            continue
        alive.append((spec, node, inside))
    usual_mtu = _usual_mtu(seen)
    for spec, node, inside in alive:
        yield from _setting_faults(spec, inside)
        yield from _route_faults(seen, spec, inside)
        yield from _mtu_faults(spec, inside, usual_mtu)
        yield from _conntrack_faults(spec, inside)
        yield from _proxy_faults(seen, node, inside)


def lost_nodes(seen: ClusterSeen) -> frozenset[str]:
    """Return the nodes whose pods cannot be blamed: not ready, or cut off."""
    return frozenset(
        name_of(node)
        for node in seen.list("nodes")
        if not _is_ready(node) or _link_is_down(seen, name_of(node), seen.nodes_seen.get(name_of(node), NodeSeen()))
    )


def _ready_condition(node: Object) -> Object:
    conditions = (node.get("status") or {}).get("conditions") or ()
    return next((dict(one) for one in conditions if one.get("type") == "Ready"), {})


def _is_ready(node: Object) -> bool:
    return bool(_ready_condition(node).get("status") == "True")


def _link_is_down(seen: ClusterSeen, name: str, inside: NodeSeen) -> bool:
    spec = {node.name: node for node in seen.topology.nodes}.get(name)
    link = inside.links.get(spec.interface) if spec else None
    return link is not None and not link.has_carrier


def _why_lost(spec: NodeSpec, node: Object, inside: NodeSeen) -> Finding | None:
    where = f"node {spec.name}"
    if not _is_ready(node):
        ready = _ready_condition(node)
        message = ready.get("message") or "no condition Ready"
        since = f" since {ready['lastTransitionTime']}" if ready.get("lastTransitionTime") else ""
        return Finding(
            cause="node-lost", where=where, what=f"Ready is {ready.get('status', 'unknown')}{since}: {message}",
            do="switch it on or plug it in; until then its endpoints get no traffic, and after "
            "tolerationSeconds (300) its pods are replaced elsewhere",
        )  # fmt: skip
    link = inside.links.get(spec.interface)
    if link is not None and not link.has_carrier:
        return Finding(
            cause="link-down", where=where, what=f"{spec.interface} has no carrier: nobody on the LAN reaches {spec.address}",
            do=f"plug it in (`ip link set {spec.interface} up`, or the fault step link: {spec.name}, down: false)",
        )  # fmt: skip
    if inside.failure:
        return Finding(
            cause="node-unseen", where=where, what=f"could not be looked at: {inside.failure}", do="see `testbed ls`"
        )
    return None


def _setting_faults(spec: NodeSpec, inside: NodeSeen) -> Iterator[Finding]:
    where = f"node {spec.name}"
    if inside.sysctls.get(BRIDGE_SETTING) == "0":
        yield Finding(
            cause="br-netfilter-off", where=where,
            what="net.bridge.bridge-nf-call-iptables is 0: an answer from a pod to a pod of the same node crosses the bridge "
            "without being translated back, so that the client does not know it",
            do="sysctl -w net.bridge.bridge-nf-call-iptables=1, and write it to /etc/sysctl.d",
        )  # fmt: skip
    if inside.sysctls.get(FORWARD_SETTING) == "0":
        yield Finding(
            cause="ip-forward-off", where=where, what="net.ipv4.ip_forward is 0: nothing is handed on to pods",
            do="sysctl -w net.ipv4.ip_forward=1, and write it to /etc/sysctl.d",
        )  # fmt: skip
    without = sorted(port for port, has_hairpin in inside.bridge_ports.items() if not has_hairpin)
    if without:
        yield Finding(
            cause="hairpin-off", where=where,
            what=f"{len(without)} of {len(inside.bridge_ports)} ports of cni0 are not in hairpin mode ({listed(without)}): a "
            "pod does not reach itself through its own Service",
            do="for port in /sys/class/net/cni0/brif/*; do echo 1 > $port/hairpin_mode; done; in a CNI configuration "
            "hairpinMode: true",
        )  # fmt: skip


def _route_faults(seen: ClusterSeen, spec: NodeSpec, inside: NodeSeen) -> Iterator[Finding]:
    """Strict reverse-path filtering drops what comes in by another link than the answer would leave by."""
    strictness = (inside.sysctls.get(f"net/ipv4/conf/{name}/rp_filter", "0") for name in ("all", spec.interface))
    if max(strictness) != _STRICT:  # the larger of both counts (ip-sysctl.rst)
        return
    elsewhere = []
    for other in seen.topology.machines:
        if other.name == spec.name:
            continue
        addresses = [other.address, *([other.pod_cidr[1]] if isinstance(other, NodeSpec) else [])]
        for address in addresses:
            routes = [route for route in inside.routes if address in route.destination]
            best = max(routes, key=lambda route: route.destination.prefixlen, default=None)
            if best is not None and best.link != spec.interface:
                elsewhere.append(f"{best.destination} ({other.name}) by {best.link}")
    if elsewhere:
        yield Finding(
            cause="rp-filter", where=f"node {spec.name}",
            what=f"rp_filter of {spec.interface} is strict (1), and routes lead back by another link: {listed(elsewhere)}; "
            f"what comes from there by {spec.interface} is dropped without a word",
            do=f"sysctl -w net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.{spec.interface}.rp_filter=2 (loose), or make the "
            "routes symmetric",
        )  # fmt: skip


def _usual_mtu(seen: ClusterSeen) -> int:
    """Return the MTU that most nodes' LAN links have, the largest of several; 0 when nobody has one."""
    found = Counter(
        link.mtu_bytes
        for spec in seen.topology.nodes
        if (inside := seen.nodes_seen.get(spec.name)) and (link := inside.links.get(spec.interface))
    )
    return max(found, key=lambda mtu: (found[mtu], mtu), default=0)


def _mtu_faults(spec: NodeSpec, inside: NodeSeen, usual: int) -> Iterator[Finding]:
    link = inside.links.get(spec.interface)
    if link is None or link.mtu_bytes == usual:
        return
    yield Finding(
        cause="mtu-mismatch", where=f"node {spec.name}",
        what=f"{spec.interface} has an MTU of {link.mtu_bytes}, the other nodes' LAN links have {usual}: small packets pass, "
        "large ones between them vanish, and no ICMP tells the sender",
        do=f"ip link set {spec.interface} mtu {usual}; with a tunnel give pods an MTU that leaves room for its header",
    )  # fmt: skip


def _is_full(inside: NodeSeen) -> bool:
    return bool(inside.conntrack_max) and inside.conntrack_count >= _NEARLY_FULL * inside.conntrack_max


def _conntrack_faults(spec: NodeSpec, inside: NodeSeen) -> Iterator[Finding]:
    if _is_full(inside):
        yield Finding(
            cause="conntrack-full", where=f"node {spec.name}",
            what=f"{inside.conntrack_count} of {inside.conntrack_max} connection tracking entries are used: packets of new "
            "connections are dropped (nf_conntrack: table full)",
            do="raise net.netfilter.nf_conntrack_max (kube-proxy: conntrack.maxPerCore), find who makes so many "
            "(`conntrack -L`), or empty it: conntrack -F",
        )  # fmt: skip


def _proxy_faults(seen: ClusterSeen, node: Object, inside: NodeSeen) -> Iterator[Finding]:
    name = name_of(node)
    state = proxy_state(seen, name)
    damage = find_damage(seen, node, inside, state)
    # With a full table our own question to its health port is dropped as well.
    if inside.proxy_answer and not _is_full(inside):
        behind = f"; its rules are behind: {_what_differs(damage)}" if damage.text else "; its rules are still right"
        yield Finding(
            cause="kube-proxy-down", where=f"node {name}",
            what=f"kube-proxy does not answer on its health port ({inside.proxy_answer}){behind}",
            do=f"kubectl -n kube-system get pods -o wide, and logs of the one on {name}; then {_RESTART_PROXY}",
            about=damage.services,
        )  # fmt: skip
        return  # what it has not done for that reason is no other fault
    if damage.text:
        yield Finding(
            cause="rules-differ", where=f"node {name}",
            what=f"the rules are not those that kube-proxy should have written: {_what_differs(damage)}",
            do=f"somebody else changes them (a firewall, iptables -F); {_RESTART_PROXY} has all of them written again",
            about=damage.services,
        )  # fmt: skip
    if seen.config.mode == "userspace":
        return  # kube-proxy itself listens on nodePorts, and flows end in it
    yield from _stale_flows(name, inside, state)
    yield from _taken_ports(name, inside, state)


def _what_differs(damage: RuleDamage) -> str:
    of = f" (Services {listed(damage.services)})" if damage.services else ""
    return damage.text + of


def _stale_flows(name: str, inside: NodeSeen, state: ProxyState) -> Iterator[Finding]:
    stale = stale_udp_flows(inside.udp_flows, state, (), inside.local_addresses)
    if not stale:
        return
    first = stale[0]
    by_address = {
        (str(address), port.port): f"{port.name.namespace}/{port.name.name}"
        for port in state.services.values()
        for address in (port.cluster_ip, *port.external_ips, *port.load_balancer_ips)
    }
    services = dict.fromkeys(
        service for flow in stale if (service := by_address.get((str(flow.destination), flow.port))) is not None
    )
    yield Finding(
        cause="stale-conntrack", where=f"node {name}",
        what=f"{_flows(len(stale))} on to an endpoint that is gone, for example {first.source}:{first.source_port} to "
        f"{first.destination}:{first.port}, answered by {first.answered_by}:{first.answered_from}",
        do=f"conntrack -D -p udp --orig-dst {first.destination} --reply-src {first.answered_by} on {name}; kube-proxy does it "
        "when endpoints go, unless it was not there then",
        about=tuple(services),
    )  # fmt: skip


def _flows(number: int) -> str:
    return "a UDP flow goes" if number == 1 else f"{number} UDP flows go"


def _taken_ports(name: str, inside: NodeSeen, state: ProxyState) -> Iterator[Finding]:
    for port in state.services.values():
        key = (port.protocol.value.lower(), port.node_port)
        if port.node_port and key in inside.listening:
            service = f"{port.name.namespace}/{port.name.name}"
            yield Finding(
                cause="node-port-taken", where=f"node {name}",
                what=f"a program of the node listens on {port.node_port}/{key[0]}, the nodePort of Service {service}: who asks "
                "for it gets the Service's pods instead",
                do=f"ss -lnp 'sport = :{port.node_port}' on {name} shows the program; move it, or give the Service another "
                "nodePort",
                about=(service,),
            )  # fmt: skip
