"""Walks a packet through what kube-proxy programs in ipvs mode, and says where it comes out.

::

    from outside or a pod:  nat PREROUTING ─┬─ filter INPUT ─ IPVS ─ filter OUTPUT ─ nat POSTROUTING
                                            └─ filter FORWARD ─ nat POSTROUTING
    from the node:          nat OUTPUT ─ IPVS ─ filter OUTPUT ─ nat POSTROUTING, or filter INPUT

Bound addresses are the node's own. The packet is the first of its connection. The rules are walked by the interpreter of
iptables mode.

Source: kubernetes pkg/proxy/ipvs/README.md; linux net/netfilter/ipvs/ip_vs_core.c (ip_vs_ops: LOCAL_IN after the filter,
LOCAL_OUT before it), ip_vs_xmit.c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Address

from testbed.dataplane.ipvs import IpvsObjects, IpvsRenderer, VirtualServer
from testbed.dataplane.ipvs_rules import render_payload
from testbed.dataplane.trace import Fate, Node, Packet, State, Verdict, Walker, fate_of, parse_rules

_End = tuple[Verdict, str, bool]


class IpvsTracer:
    """A node on which all is as a renderer wants it.

    Args:
        renderer: What is programmed.
        node: The node's addresses, but for those on kube-ipvs0.
    """

    def __init__(self, renderer: IpvsRenderer, node: Node) -> None:
        self._wanted = renderer.wanted()
        bound = {IPv4Address(address) for address in self._wanted.addresses}
        self._here = Node(node.addresses | bound, self._wanted.members)
        self._rules = parse_rules(render_payload(renderer.rules()))

    def trace(self, packet: Packet) -> Fate:
        """Return the fate of a packet that meets the node.

        Raises:
            ValueError: the ways out disagree in kind.
        """
        return _Trace(Walker(self._rules, self._here), self._wanted, self._here).fate(packet)


class _Trace:
    """One packet's walk."""

    def __init__(self, walker: Walker, wanted: IpvsObjects, here: Node) -> None:
        self._walker = walker
        self._wanted = wanted
        self._here = here

    def fate(self, packet: Packet) -> Fate:
        state = State(packet, IPv4Address(packet.source), IPv4Address(packet.destination), packet.port)
        return fate_of(packet, set(self._ends(state)), self._walker.met)

    def _ends(self, state: State) -> Iterator[_End]:
        from_node, to_node = self._here.owns(state.source), self._here.owns(state.destination)
        key = VirtualServer(state.packet.protocol, str(state.destination), state.port)
        server = self._wanted.servers.get(key)
        for _, routed in self._walker.hook("nat", "OUTPUT" if from_node else "PREROUTING", state):
            if from_node and server is not None:
                yield from self._balance(key, server.real, routed)
                continue
            hooks = [hook for hook, passed in (("OUTPUT", from_node), ("INPUT", to_node)) if passed] or ["FORWARD"]
            for ended, sent, accepted in self._filtered(hooks, routed):
                if ended is not None:
                    yield ended, "", False
                elif to_node and server is not None:
                    yield from self._balance(key, server.real, sent)
                elif to_node:
                    yield (Verdict.ACCEPT if accepted else Verdict.NONE), "", sent.masquerade
                else:
                    yield from self._leave(sent, accepted=accepted)

    def _filtered(self, hooks: Sequence[str], state: State) -> Iterator[tuple[Verdict | None, State, bool]]:
        """Yield each way through some chains of filter: how it ends (None: it does not), the packet, whether it was accepted."""
        if not hooks:
            yield None, state, False
            return
        for verdict, after in self._walker.hook("filter", hooks[0], state):
            if verdict in (Verdict.DROP.value, Verdict.REJECT.value):
                yield Verdict(verdict), after, False
            else:
                for ended, sent, accepted in self._filtered(hooks[1:], after):
                    yield ended, sent, accepted or bool(verdict)

    def _balance(self, key: VirtualServer, real: Mapping[str, int], state: State) -> Iterator[_End]:
        self._walker.met.setdefault(f"IPVS: virtual server {key}")
        if not real:
            # ip_vs_leave(): the kernel answers with ICMP port unreachable
            yield Verdict.REJECT, "", False
        for endpoint in real:
            address, _, port = endpoint.rpartition(":")
            moved = replace(
                state,
                endpoint=endpoint,
                destination=IPv4Address(address),
                port=int(port),
                virtual=(key.protocol, key.address, key.port),
            )
            # ip_vs_nat_xmit() sends through LOCAL_OUT, whoever the packet came from
            for ended, sent, accepted in self._filtered(["OUTPUT"], moved):
                if ended is not None:
                    yield ended, "", False
                else:
                    yield from self._leave(sent, accepted=accepted)

    def _leave(self, state: State, *, accepted: bool) -> Iterator[_End]:
        for _, sent in self._walker.hook("nat", "POSTROUTING", state):
            if sent.endpoint:
                yield Verdict.ENDPOINT, sent.endpoint, sent.masquerade
            else:
                yield (Verdict.ACCEPT if accepted else Verdict.NONE), "", sent.masquerade
