"""Which UDP conntrack entries must be forgotten after a sync.

nat decides for the first packet of a flow. A UDP client that keeps its source port never starts a new one, so its packets
would go on to an endpoint that is gone, or past a Service that has just got its first.

Source: kubernetes pkg/proxy/{conntrack/cleanup,endpointschangetracker,servicechangetracker}.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address

from testbed.dataplane.state import ProxyState
from testbed.model.service import Protocol, ServicePort, ServicePortName


@dataclass(frozen=True, slots=True, order=True)
class StaleFlows:
    """UDP flows first sent to an address, or to a port of the node, and (unless None) translated to one endpoint."""

    destination: IPv4Address | None = None
    port: int = 0
    endpoint: IPv4Address | None = None


def stale_udp_flows(
    before: ProxyState, after: ProxyState, changed: Iterable[ServicePortName]
) -> tuple[StaleFlows, ...]:
    """Return the flows to forget, without doubles, in the order of the service ports' names."""
    found: dict[StaleFlows, None] = {}
    for name in sorted(changed):
        if name.protocol != Protocol.UDP.value:
            continue
        old, new = before.services.get(name), after.services.get(name)
        if old is not None and new is None:
            found[StaleFlows(destination=old.cluster_ip)] = None
        old_ready = {e.text: e.address for e in before.endpoints.get(name, ()) if e.ready}
        new_ready = {e.text: e.address for e in after.endpoints.get(name, ()) if e.ready}
        if new is None:
            continue
        if new_ready and not old_ready:
            found.update(dict.fromkeys(_flows_to(new, None)))
        for text in sorted(old_ready.keys() - new_ready.keys()):
            found.update(dict.fromkeys(_flows_to(new, old_ready[text])))
    return tuple(found)


def _flows_to(service: ServicePort, endpoint: IPv4Address | None) -> Iterable[StaleFlows]:
    for address in (service.cluster_ip, *service.external_ips, *service.load_balancer_ips):
        yield StaleFlows(destination=address, endpoint=endpoint)
    if service.node_port:
        yield StaleFlows(port=service.node_port, endpoint=endpoint)
