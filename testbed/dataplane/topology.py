"""Which endpoints a node uses for a service port, whatever the backend.

Source: kubernetes pkg/proxy/topology.go, CategorizeEndpoints (v1.30; node hints from v1.33).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from testbed.model.service import Endpoint, ServicePort

ZONE_LABEL = "topology.kubernetes.io/zone"


@dataclass(frozen=True, slots=True)
class HintPolicy:
    """Which topology hints count. Upstream 1.30 wants an annotation on the Service; newer ones need no permission."""

    without_annotation: bool = False  # feature gate ServiceTrafficDistribution
    of_nodes: bool = False  # feature gate PreferSameTrafficDistribution


ANNOTATED_ONLY = HintPolicy()


@dataclass(frozen=True, slots=True)
class EndpointChoice:
    """The endpoints of one service port that one node uses, each list in the order of the input.

    ``cluster`` serves policy Cluster, ``local`` policy Local, ``reachable`` is their union. ``has_any`` says whether any
    endpoint of the cluster could serve: it tells "drop, others can" from "refuse, nobody can".
    """

    cluster: tuple[Endpoint, ...]
    local: tuple[Endpoint, ...]
    reachable: tuple[Endpoint, ...]
    has_any: bool


def choose_endpoints(
    service: ServicePort,
    endpoints: Sequence[Endpoint],
    node_labels: Mapping[str, str],
    node: str = "",
    hints: HintPolicy = ANNOTATED_ONLY,
) -> EndpointChoice:
    """Return the endpoints that ``node`` uses for ``service``.

    Ready endpoints are preferred; when there is none, those that still serve while they terminate are used, so that a
    rolling update loses no connection. The local list is never narrowed by hints.
    """
    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    if service.uses_cluster_endpoints:
        cluster = _nearest(service, [e for e in endpoints if e.ready], node_labels, node, hints)
        cluster = cluster or tuple(e for e in endpoints if e.serving and e.terminating)
    if not service.uses_local_endpoints:
        return EndpointChoice(cluster, (), cluster, bool(cluster))
    here = [e for e in endpoints if e.is_local]
    local = tuple(e for e in here if e.ready) or tuple(e for e in here if e.serving and e.terminating)
    has_any = any(e.ready or (e.serving and e.terminating) for e in endpoints)
    if not cluster or not local:
        reachable = cluster or local
    else:
        used = {e.text for e in cluster} | {e.text for e in local}
        reachable = tuple(e for e in endpoints if e.text in used)
    return EndpointChoice(cluster, local, reachable, has_any)


def _nearest(
    service: ServicePort, ready: Sequence[Endpoint], node_labels: Mapping[str, str], node: str, hints: HintPolicy
) -> tuple[Endpoint, ...]:
    """Narrow ready endpoints to those hinted for this node or its zone, if every one of them carries such a hint."""
    if not hints.without_annotation and service.topology_mode in ("", "disabled", "Disabled"):
        return tuple(ready)
    zone = node_labels.get(ZONE_LABEL, "")
    wanted: list[tuple[str, Callable[[Endpoint], frozenset[str]]]] = []
    if hints.of_nodes and node:
        wanted.append((node, lambda e: e.node_hints))
    if zone:
        wanted.append((zone, lambda e: e.zone_hints))
    for name, hint_of in wanted:
        if all(hint_of(e) for e in ready):  # one endpoint without a hint: the hints are incomplete, do not trust them
            near = tuple(e for e in ready if name in hint_of(e))
            if near:
                return near
    return tuple(ready)
