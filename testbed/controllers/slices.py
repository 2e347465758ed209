"""EndpointSlices as values: which there should be, and the least change that makes them so. Pure.

::

    pods of a Service ──▶ endpoints, grouped by the ports they resolve to ──▶ plan_slices ──▶ create / update / delete
                                                              existing slices ──┘

Source: kubernetes staging/src/k8s.io/endpointslice/{reconciler,utils}.go, trafficdist (v1.30, trafficdist v1.31).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from testbed.controllers.pods import is_finished, is_ready
from testbed.model.objects import Object, is_terminating, labels_of

MAX_ENDPOINTS = 100  # per slice: --max-endpoints-per-slice
SERVICE_NAME = "kubernetes.io/service-name"
MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
HEADLESS = "service.kubernetes.io/headless"
TRIGGER_TIME = "endpoints.kubernetes.io/last-change-trigger-time"
ZONE_LABEL = "topology.kubernetes.io/zone"
_ZONE_DISTRIBUTIONS = ("PreferClose", "PreferSameZone", "PreferSameNode")


class Port(NamedTuple):
    """A Service port as one pod resolves it."""

    name: str
    protocol: str
    port: int
    app_protocol: str = ""


class Group(NamedTuple):
    """What all endpoints of a slice have in common."""

    address_type: str
    ports: tuple[Port, ...]


Endpoint = Object
Identity = tuple[str, str]  # address, uid of the target


@dataclass(slots=True)
class SlicePlan:
    """What to do to the slices of a Service; slices here have endpoints, ports and addressType, and those kept their metadata."""

    create: list[Object] = field(default_factory=list)
    update: list[Object] = field(default_factory=list)
    delete: list[Object] = field(default_factory=list)


def resolve_port(pod: Object, target_port: int | str, protocol: str) -> int | None:
    """Return the number of a Service's targetPort in a pod: itself, or of the container port of that name and protocol."""
    if isinstance(target_port, int):
        return target_port
    spec = pod.get("spec", {})
    sidecars = [one for one in spec.get("initContainers") or () if one.get("restartPolicy") == "Always"]
    for container in (*(spec.get("containers") or ()), *sidecars):
        for port in container.get("ports") or ():
            if port.get("name") == target_port and (port.get("protocol") or "TCP") == protocol:
                return int(port["containerPort"])
    return None


def ports_of(service: Object, pod: Object) -> tuple[Port, ...]:
    """Return the Service's ports as a pod resolves them; a name that the pod does not have is left out."""
    ports = []
    for port in service["spec"].get("ports") or ():
        protocol = port.get("protocol") or "TCP"
        number = resolve_port(pod, port.get("targetPort") or port["port"], protocol)
        if number is not None:
            ports.append(Port(port.get("name") or "", protocol, number, port.get("appProtocol") or ""))
    return tuple(ports)


def pod_addresses(pod: Object) -> list[str]:
    status = pod.get("status") or {}
    several = [one["ip"] for one in status.get("podIPs") or () if one.get("ip")]
    return several or ([status["podIP"]] if status.get("podIP") else [])


@lru_cache(maxsize=65536)  # parsing took half of the time of a Service with many endpoints
def parsed_address(address: str) -> IPv4Address | IPv6Address:
    return ip_address(address)


def address_type(address: str) -> str:
    return f"IPv{parsed_address(address).version}"


def pod_endpoint(service: Object, pod: Object, address: str, zone: str) -> Endpoint:
    """Return a pod as an endpoint of a Service."""
    ready, terminating = is_ready(pod), is_terminating(pod)
    spec = pod["spec"]
    endpoint: Endpoint = {
        "addresses": [address],
        "conditions": {
            "ready": bool(service["spec"].get("publishNotReadyAddresses")) or (ready and not terminating),
            "serving": ready,
            "terminating": terminating,
        },
    }
    if spec.get("hostname") and spec.get("subdomain") == service["metadata"]["name"]:
        endpoint["hostname"] = spec["hostname"]
    endpoint["targetRef"] = target_reference(pod)
    if spec.get("nodeName"):
        endpoint["nodeName"] = spec["nodeName"]
    if zone:
        endpoint["zone"] = zone
    hints = _hints(str(service["spec"].get("trafficDistribution") or ""), endpoint)
    if hints:
        endpoint["hints"] = hints
    return endpoint


def target_reference(pod: Object) -> Object:
    metadata = pod["metadata"]
    return {"kind": "Pod", "namespace": metadata["namespace"], "name": metadata["name"], "uid": metadata["uid"]}


def _hints(distribution: str, endpoint: Endpoint) -> Object:
    """Return which zone (and node) a ready endpoint is meant for: its own (KEP-4444, KEP-3015)."""
    if distribution not in _ZONE_DISTRIBUTIONS or not endpoint["conditions"]["ready"]:
        return {}
    hints: Object = {}
    if endpoint.get("zone"):
        hints["forZones"] = [{"name": endpoint["zone"]}]
    if distribution == "PreferSameNode" and endpoint.get("nodeName"):
        hints["forNodes"] = [{"name": endpoint["nodeName"]}]
    return hints


def desired_endpoints(
    service: Object, pods: Iterable[Object], zone_of: Callable[[str], str]
) -> dict[Group, dict[Identity, Endpoint]]:
    """Return the endpoints of a Service by what their slices have in common.

    Args:
        pods: The pods that the Service selects.
        zone_of: The zone of a node, '' if it has none.
    """
    families = set(service["spec"].get("ipFamilies") or ["IPv4"])
    desired: dict[Group, dict[Identity, Endpoint]] = {}
    for pod in pods:
        if is_finished(pod):
            continue
        ports: tuple[Port, ...] | None = None
        for address in pod_addresses(pod):
            family = address_type(address)
            if family not in families:
                continue
            if ports is None:
                ports = ports_of(service, pod)
            endpoint = pod_endpoint(service, pod, address, zone_of(pod["spec"].get("nodeName", "")))
            desired.setdefault(Group(family, ports), {})[identity_of(endpoint)] = endpoint
    return desired


def identity_of(endpoint: Endpoint) -> Identity:
    """Return what makes an endpoint the same one when its conditions change."""
    return endpoint["addresses"][0], (endpoint.get("targetRef") or {}).get("uid", "")


def group_of(endpoint_slice: Object) -> Group:
    ports = (
        Port(
            port.get("name") or "", port.get("protocol") or "TCP", port.get("port") or 0, port.get("appProtocol") or ""
        )
        for port in endpoint_slice.get("ports") or ()
    )
    return Group(endpoint_slice["addressType"], tuple(ports))


def plan_slices(
    existing: Sequence[Object], desired: Mapping[Group, Mapping[Identity, Endpoint]], placeholders: Iterable[str] = ()
) -> SlicePlan:
    """Return the least change that makes the slices hold the desired endpoints, each exactly once.

    Endpoints stay in the slice they are in. New ones go where something changes anyway, then into new slices of 100,
    and what remains into the fullest slice that has room.

    Args:
        existing: The slices of the Service that are ours.
        placeholders: Address types that have a slice without endpoints and ports as long as they have no other.
    """
    plan = SlicePlan()
    of_group: dict[Group, list[Object]] = {}
    for one in existing:
        of_group.setdefault(group_of(one), []).append(one)
    used: set[str] = set()
    for group, endpoints in desired.items():
        if endpoints:
            used.add(group.address_type)
            _plan_group(plan, group, of_group.pop(group, []), endpoints)
    for address in placeholders:
        if address not in used:
            kept = of_group.get(Group(address, ()))
            if kept:
                empty = kept.pop(0)
                if empty.get("endpoints"):
                    plan.update.append({**empty, "endpoints": []})
            else:
                plan.create.append(_slice(Group(address, ()), []))
    plan.delete.extend(one for others in of_group.values() for one in others)
    _reuse_deleted(plan)
    return plan


def _reuse_deleted(plan: SlicePlan) -> None:
    """Turn a deletion and a creation into one update, so that readers see one change and no gap."""
    for new in list(plan.create):
        old = next((one for one in plan.delete if one["addressType"] == new["addressType"]), None)
        if old is not None:
            plan.create.remove(new)
            plan.delete.remove(old)
            plan.update.append({**old, "endpoints": new["endpoints"], "ports": new["ports"]})


def _plan_group(
    plan: SlicePlan, group: Group, existing: Sequence[Object], desired: Mapping[Identity, Endpoint]
) -> None:
    missing = dict(desired)
    unchanged: list[tuple[Object, list[Endpoint]]] = []
    changed: list[tuple[Object, list[Endpoint]]] = []
    for one in existing:
        have = one.get("endpoints") or []
        kept = [missing.pop(identity) for endpoint in have if (identity := identity_of(endpoint)) in missing]
        if not kept:
            plan.delete.append(one)
        elif kept != have:
            changed.append((one, kept))
        else:
            unchanged.append((one, kept))
    new = list(missing.values())
    for _, kept in sorted(changed, key=lambda pair: -len(pair[1])):
        room = MAX_ENDPOINTS - len(kept)
        kept.extend(new[:room])
        del new[:room]
    while len(new) >= MAX_ENDPOINTS:
        plan.create.append(_slice(group, new[:MAX_ENDPOINTS]))
        del new[:MAX_ENDPOINTS]
    if new:
        roomy = [pair for pair in unchanged if len(pair[1]) + len(new) <= MAX_ENDPOINTS]
        if roomy:
            fullest = max(roomy, key=lambda pair: len(pair[1]))
            fullest[1].extend(new)
            changed.append(fullest)
        else:
            plan.create.append(_slice(group, new))
    plan.update.extend({**one, "endpoints": kept} for one, kept in changed)


def _slice(group: Group, endpoints: list[Endpoint]) -> Object:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "addressType": group.address_type,
        "endpoints": endpoints,
        "ports": [render_port(port) for port in group.ports],
    }


def render_port(port: Port) -> Object:
    """Return an entry of a slice's or subset's ports."""
    rendered: Object = {"name": port.name, "port": port.port, "protocol": port.protocol}
    return {**rendered, "appProtocol": port.app_protocol} if port.app_protocol else rendered


def is_headless(service: Object) -> bool:
    return service["spec"].get("clusterIP") in ("None", "", None)


def slice_labels(service: Object, managed_by: str) -> dict[str, str]:
    """Return the labels of a Service's slices: its own, and those by which slices are found."""
    own = {name: value for name, value in labels_of(service).items() if name != HEADLESS}
    headless = {HEADLESS: ""} if is_headless(service) else {}
    return {**own, **headless, SERVICE_NAME: service["metadata"]["name"], MANAGED_BY: managed_by}
