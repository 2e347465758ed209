"""Walks a packet through what kube-proxy programs in ipvs mode, and says where it comes out.

::

    from outside or a pod:  nat PREROUTING ─┬─ filter INPUT ─ IPVS ─ nat POSTROUTING     (to the node: bound addresses, too)
                                            └─ filter FORWARD ─ nat POSTROUTING
    from the node:          nat OUTPUT ─ filter OUTPUT ─ IPVS ─ nat POSTROUTING, or filter INPUT

The packet is the first of its connection. The rules are walked by the same interpreter as iptables mode's.

Source: kubernetes pkg/proxy/ipvs/README.md; linux net/netfilter/ipvs/ip_vs_core.c (ip_vs_ops: LOCAL_IN after the filter,
LOCAL_OUT before it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address

from testbed.dataplane.ipvs import IpvsObjects, IpvsRenderer, VirtualServer
from testbed.dataplane.ipvs_rules import render_payload
from testbed.dataplane.trace import Fate, Node, Packet, State, Verdict, Walker, fate_of, parse_rules

_End = tuple[Verdict, str, bool]


def trace_ipvs(renderer: IpvsRenderer, packet: Packet, node: Node) -> Fate:
    """Return the fate of a packet that meets a node on which all is as the renderer wants it.

    Args:
        renderer: What is programmed.
        packet: The packet.
        node: The node's addresses, but for those on kube-ipvs0.

    Raises:
        ValueError: the ways out disagree in kind.
    """
    wanted = renderer.wanted()
    here = Node(node.addresses | {IPv4Address(address) for address in wanted.addresses}, wanted.members)
    rules = parse_rules(render_payload(renderer.rules()))
    return _Trace(Walker(rules, here), wanted, node, here).fate(packet)


class _Trace:
    def __init__(self, walker: Walker, wanted: IpvsObjects, node: Node, here: Node) -> None:
        self._walker = walker
        self._wanted = wanted
        self._node = node  # without what is bound
        self._here = here

    def fate(self, packet: Packet) -> Fate:
        state = State(packet, IPv4Address(packet.source), IPv4Address(packet.destination), packet.port)
        return fate_of(packet, set(self._ends(state)), self._walker.met)

    def _ends(self, state: State) -> Iterator[_End]:
        from_node, to_node = self._here.owns(state.source), self._here.owns(state.destination)
        server = self._wanted.servers.get(VirtualServer(state.packet.protocol, str(state.destination), state.port))
        for _, routed in self._walker.hook("nat", "OUTPUT" if from_node else "PREROUTING", state):
            if from_node:
                for verdict, sent in self._walker.hook("filter", "OUTPUT", routed):
                    if verdict in ("DROP", "REJECT"):
                        yield Verdict(verdict), "", False
                    elif server is not None:
                        yield from self._balance(server.real, sent)
                    elif to_node:
                        yield from self._let_in(sent, None)
                    else:
                        yield from self._leave(sent, accepted=bool(verdict))
            elif to_node:
                yield from self._let_in(routed, server.real if server is not None else None)
            else:
                for verdict, sent in self._walker.hook("filter", "FORWARD", routed):
                    if verdict in ("DROP", "REJECT"):
                        yield Verdict(verdict), "", False
                    else:
                        yield from self._leave(sent, accepted=bool(verdict))

    def _let_in(self, state: State, real: object) -> Iterator[_End]:
        for verdict, sent in self._walker.hook("filter", "INPUT", state):
            if verdict in ("DROP", "REJECT"):
                yield Verdict(verdict), "", False
            elif isinstance(real, dict):
                yield from self._balance(real, sent)
            else:
                yield (Verdict.ACCEPT if verdict else Verdict.NONE), "", sent.masquerade

    def _balance(self, real: object, state: State) -> Iterator[_End]:
        assert isinstance(real, dict)
        self._walker.met.setdefault(f"IPVS: {state.packet.protocol} {state.destination}:{state.port}")
        if not real:
            # ip_vs_leave: a virtual server without real ones answers ICMP port unreachable
            yield Verdict.REJECT, "", False
        for endpoint in real:
            address, _, port = endpoint.rpartition(":")
            moved = replace(state, endpoint=endpoint, destination=IPv4Address(address), port=int(port))
            yield from self._leave(moved, accepted=False)

    def _leave(self, state: State, *, accepted: bool) -> Iterator[_End]:
        for _, sent in self._walker.hook("nat", "POSTROUTING", state):
            if sent.endpoint:
                yield Verdict.ENDPOINT, sent.endpoint, sent.masquerade
            else:
                yield (Verdict.ACCEPT if accepted else Verdict.NONE), "", sent.masquerade
