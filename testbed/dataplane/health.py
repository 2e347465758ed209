"""What health-check node ports answer, decided from Services and endpoints.

Source: kubernetes pkg/proxy/healthcheck/service_health.go (v1.30).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from testbed.dataplane.state import ProxyState


@dataclass(frozen=True, slots=True, order=True)
class HealthCheck:
    """One Service's health-check node port and how many ready endpoints of the Service this node has."""

    namespace: str
    name: str
    port: int
    local_endpoints: int


def health_checks(state: ProxyState) -> tuple[HealthCheck, ...]:
    """Return the health checks of all Services that have one, sorted. Addresses are counted once, whatever their ports."""
    ports: dict[tuple[str, str], int] = {}
    local: dict[tuple[str, str], set[str]] = {}
    for name, service in state.services.items():
        if service.health_check_node_port:
            owner = (name.namespace, name.name)
            ports[owner] = service.health_check_node_port
            ready = (str(e.address) for e in state.endpoints.get(name, ()) if e.is_local and e.ready)
            local.setdefault(owner, set()).update(ready)
    return tuple(sorted(HealthCheck(*owner, port, len(local[owner])) for owner, port in ports.items()))


def render_health_check(check: HealthCheck, *, proxy_healthy: bool) -> tuple[int, str]:
    """Return the HTTP status and the body, which upstream indents by tabs and ends without a newline."""
    body = {
        "service": {"namespace": check.namespace, "name": check.name},
        "localEndpoints": check.local_endpoints,
        "serviceProxyHealthy": proxy_healthy,
    }
    return (200 if check.local_endpoints and proxy_healthy else 503), json.dumps(body, indent="\t")
