"""Which UDP connection tracking entries must be forgotten after a sync.

nat decides for the first packet of a flow. A UDP client that keeps its source port never starts a new one, so its packets
would go on to an endpoint that is gone, or past a Service that has just got its first.

The entries are reconciled: what is there is compared with what should be, whatever happened before.

Source: kubernetes pkg/proxy/conntrack/cleanup.go, CleanStaleEntries (v1.33).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address

from testbed.dataplane.state import ProxyState
from testbed.model.service import Protocol, ServicePort, ServicePortName

_LOOPBACK = 127


@dataclass(frozen=True, slots=True, order=True)
class UdpFlow:
    """An entry: who sent what where, and who answers; translated flows are answered by an endpoint."""

    source: IPv4Address
    source_port: int
    destination: IPv4Address
    port: int
    answered_by: IPv4Address
    answered_from: int


def stale_udp_flows(
    flows: Iterable[UdpFlow],
    state: ProxyState,
    deleted: Collection[ServicePort] = (),
    local_addresses: Collection[IPv4Address] = (),
) -> list[UdpFlow]:
    """Return the flows to a UDP service port that are answered by something other than a serving endpoint of it.

    Args:
        flows: What the kernel has.
        state: What is programmed.
        deleted: Service ports that were programmed before: what still goes to them is stale.
        local_addresses: Of the node: a NodePort's number counts on these only, other flows may have it by accident.
    """
    to_address: dict[tuple[IPv4Address, int], set[str]] = {}
    to_node_port: dict[int, set[str]] = {}
    for service in (*deleted, *state.services.values()):  # what is there overrides what was
        if service.protocol is not Protocol.UDP:
            continue
        is_there = state.services.get(service.name) is service
        serving = {e.text for e in state.endpoints.get(service.name, ()) if e.serving} if is_there else set()
        for address in (service.cluster_ip, *service.external_ips, *service.load_balancer_ips):
            to_address[address, service.port] = serving
        if service.node_port:
            to_node_port[service.node_port] = serving
    if not to_address:
        return []
    own = frozenset(local_addresses)
    stale = []
    for flow in flows:
        serving_here = to_address.get((flow.destination, flow.port))
        if serving_here is None and (flow.destination in own or flow.destination.packed[0] == _LOOPBACK):
            serving_here = to_node_port.get(flow.port)
        if serving_here is not None and f"{flow.answered_by}:{flow.answered_from}" not in serving_here:
            stale.append(flow)
    return stale


def concerns_udp(changed: Iterable[ServicePortName]) -> bool:
    """Say whether flows may have become stale by these changes."""
    return any(name.protocol == Protocol.UDP.value for name in changed)
