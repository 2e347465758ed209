"""The controller that writes Endpoints, the older and shorter form of EndpointSlices, under the Service's own name.

Source: kubernetes pkg/controller/endpoint/endpoints_controller.go, pkg/api/v1/endpoints/util.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from testbed.controllers.endpointslice import has_selector, services_touched
from testbed.controllers.index import ClusterIndex
from testbed.controllers.pods import is_finished, is_ready
from testbed.controllers.slices import (
    HEADLESS,
    TRIGGER_TIME,
    Port,
    address_type,
    is_headless,
    parsed_address,
    pod_addresses,
    ports_of,
    render_port,
    target_reference,
)
from testbed.controllers.status import delete_if_there
from testbed.model.objects import Key, Object, is_terminating, labels_of
from testbed.registry import Registry
from testbed.store import Event, EventType

_MAX_ADDRESSES = 1000
_OVER_CAPACITY = "endpoints.kubernetes.io/over-capacity"


class EndpointsController:
    """Writes the Endpoints of Services with a selector, and deletes those of Services that are gone."""

    watches: frozenset[str] | None = frozenset({"services", "pods", "endpoints"})

    def __init__(self, index: ClusterIndex) -> None:
        self._index = index
        self._left_behind: set[Key] = set()  # Services that are gone, and whose Endpoints may still be there

    def keys(self, event: Event) -> Iterable[Key]:
        """Return the Services that a change touches, and that of Endpoints which someone deleted."""
        if event.key.resource == "services":
            if event.type is EventType.DELETED:
                self._left_behind.add(event.key)
            return [event.key]
        if event.key.resource == "endpoints":
            return [event.key._replace(resource="services")] if event.type is EventType.DELETED else []
        return services_touched(self._index, event)

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Make the Endpoints of a Service right; those of a Service without a selector are the user's."""
        service = registry.store.get(*key)
        current = registry.store.get("endpoints", key.namespace, key.name)
        if service is None:
            # Endpoints may be written before their Service; only what a Service left behind is ours to delete.
            if key in self._left_behind:
                self._left_behind.discard(key)
                delete_if_there(registry, "endpoints", key.namespace, key.name)
            return None
        if is_terminating(service) or not has_selector(service):
            return None
        pods = self._index.pods_labelled(key.namespace, service["spec"]["selector"])
        subsets, truncated = endpoint_subsets(service, pods)
        labels = {name: value for name, value in labels_of(service).items() if name != HEADLESS}
        if is_headless(service):
            labels[HEADLESS] = ""
        annotations = {_OVER_CAPACITY: "truncated"} if truncated else {}
        if current is None:
            metadata = {
                "name": key.name,
                "namespace": key.namespace,
                "labels": labels,
                "annotations": {**annotations, TRIGGER_TIME: registry.now()},
            }
            registry.create(
                "endpoints", {"apiVersion": "v1", "kind": "Endpoints", "metadata": metadata, "subsets": subsets}
            )
            return None
        have = dict(current["metadata"].get("annotations") or {})
        had_truncated = have.pop(_OVER_CAPACITY, None) is not None
        if (current.get("subsets") or []) == subsets and labels_of(current) == labels and had_truncated == truncated:
            return None
        metadata = {
            **current["metadata"],
            "labels": labels,
            "annotations": {**have, **annotations, TRIGGER_TIME: registry.now()},
        }
        registry.update("endpoints", {**current, "metadata": metadata, "subsets": subsets})
        return None


def endpoint_subsets(service: Object, pods: Sequence[Object]) -> tuple[list[Object], bool]:
    """Return the subsets, one for each set of resolved ports, with sorted addresses; and whether some were left out."""
    publish = bool(service["spec"].get("publishNotReadyAddresses"))
    family = (service["spec"].get("ipFamilies") or ["IPv4"])[0]
    found: list[tuple[tuple[Port, ...], str, bool, Object]] = []
    for pod in pods:
        if is_finished(pod) or (is_terminating(pod) and not publish):
            continue
        ip = next((one for one in pod_addresses(pod) if address_type(one) == family), None)
        ports = ports_of(service, pod) if ip else ()
        if ip and (ports or not service["spec"].get("ports")):
            found.append((ports, ip, publish or is_ready(pod), _address(service, pod, ip)))
    found.sort(key=lambda one: (not one[2], parsed_address(one[1]).packed))  # when there are too many, ready ones stay
    grouped: dict[tuple[Port, ...], dict[str, list[Object]]] = {}
    for ports, _, ready, address in found[:_MAX_ADDRESSES]:
        subset = grouped.setdefault(ports, {"addresses": [], "notReadyAddresses": []})
        subset["addresses" if ready else "notReadyAddresses"].append(address)
    subsets: list[Object] = []
    for ports, lists in sorted(grouped.items()):
        subset = {name: addresses for name, addresses in lists.items() if addresses}
        rendered = [{name: value for name, value in render_port(port).items() if value != ""} for port in ports]
        subsets.append({**subset, "ports": rendered} if rendered else dict(subset))
    return subsets, len(found) > _MAX_ADDRESSES


def _address(service: Object, pod: Object, ip: str) -> Object:
    spec = pod["spec"]
    address: Object = {"ip": ip, "targetRef": target_reference(pod)}
    if spec.get("nodeName"):
        address["nodeName"] = spec["nodeName"]
    if spec.get("hostname") and spec.get("subdomain") == service["metadata"]["name"]:
        address["hostname"] = spec["hostname"]
    return address
