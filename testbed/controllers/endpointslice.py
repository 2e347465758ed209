"""The controllers that write EndpointSlices: from selectors, and from Endpoints that people wrote."""

from __future__ import annotations

from collections.abc import Iterable

from testbed.controllers.index import ClusterIndex
from testbed.controllers.pods import controller_reference, is_ready
from testbed.controllers.slices import (
    MANAGED_BY,
    SERVICE_NAME,
    TRIGGER_TIME,
    ZONE_LABEL,
    Endpoint,
    Group,
    Identity,
    Port,
    SlicePlan,
    address_type,
    desired_endpoints,
    identity_of,
    plan_slices,
    slice_labels,
)
from testbed.controllers.status import delete_if_there
from testbed.model.objects import Key, Object, is_terminating, labels_of
from testbed.registry import Registry
from testbed.store import Event, EventType

_RESOURCE = "endpointslices.discovery.k8s.io"
CONTROLLER = "endpointslice-controller.k8s.io"
MIRROR = "endpointslicemirroring-controller.k8s.io"
SKIP_MIRROR = "endpointslice.kubernetes.io/skip-mirror"
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_MAX_MIRRORED = 1000  # addresses per subset: --mirroring-max-endpoints-per-subset


def has_selector(service: Object) -> bool:
    """Say whether the endpoints of a Service are ours to write."""
    return bool(service["spec"].get("selector")) and service["spec"].get("type") != "ExternalName"


def services_touched(index: ClusterIndex, event: Event) -> set[Key]:
    """Return the Services whose endpoints a change of a pod or node may change."""
    if event.key.resource == "nodes":
        before = labels_of(event.previous).get(ZONE_LABEL) if event.previous else None
        if event.type is not EventType.DELETED and labels_of(event.object).get(ZONE_LABEL) == before:
            return set()
        pods = index.pods_on(event.key.name)
    elif event.type is EventType.MODIFIED and event.previous and _same_endpoint(event.previous, event.object):
        return set()
    else:
        pods = [event.object] if event.previous is None else [event.object, event.previous]
    return {
        Key("services", service["metadata"]["namespace"], service["metadata"]["name"])
        for pod in pods
        for service in index.services_selecting(pod)
    }


def _same_endpoint(before: Object, after: Object) -> bool:
    """Say whether nothing changed that an endpoint shows: most status updates of a pod are like that."""
    if is_terminating(before) != is_terminating(after) or labels_of(before) != labels_of(after):
        return False
    was, now = before.get("status") or {}, after.get("status") or {}
    same_status = all(was.get(name) == now.get(name) for name in ("phase", "podIP", "podIPs"))
    same_node = before["spec"].get("nodeName") == after["spec"].get("nodeName")
    return same_status and same_node and is_ready(before) == is_ready(after)


class EndpointSliceController:
    """Writes the slices of Services with a selector."""

    watches: frozenset[str] | None = frozenset({"services", "pods", "nodes", _RESOURCE})

    def __init__(self, index: ClusterIndex) -> None:
        self._index = index
        self._writing = False  # what we change ourselves needs no second look

    def keys(self, event: Event) -> Iterable[Key]:
        """Return the Services that a change touches; of slices, those that someone else changed or deleted."""
        if event.key.resource == "services":
            return [event.key]
        if event.key.resource == _RESOURCE:
            return [] if self._writing else _service_of_slice(event, CONTROLLER)
        return services_touched(self._index, event)

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Make the slices of a Service right. Those of a Service that is gone are the garbage collector's."""
        service = registry.store.get(*key)
        if service is None or is_terminating(service) or not has_selector(service):
            return None
        pods = self._index.pods_labelled(key.namespace, service["spec"]["selector"])
        ours, stale = _own_slices(self._index, service, service, CONTROLLER)

        def zone_of(node: str) -> str:
            found = registry.store.get("nodes", "", node)
            return labels_of(found).get(ZONE_LABEL, "") if found else ""

        plan = plan_slices(
            ours, desired_endpoints(service, pods, zone_of), service["spec"].get("ipFamilies") or ["IPv4"]
        )
        plan.delete.extend(stale)
        self._writing = True
        try:
            _apply(registry, service, ours, plan, slice_labels(service, CONTROLLER), {})
        finally:
            self._writing = False
        return None


class MirroringController:
    """Writes slices for Endpoints that people wrote, for Services without a selector."""

    watches: frozenset[str] | None = frozenset({"services", "endpoints", _RESOURCE})

    def __init__(self, index: ClusterIndex) -> None:
        self._index = index
        self._writing = False  # what we change ourselves needs no second look

    def keys(self, event: Event) -> Iterable[Key]:
        """Return the Endpoints of the name that changed."""
        if event.key.resource == _RESOURCE:
            slices = [] if self._writing else _service_of_slice(event, MIRROR)
            return [key._replace(resource="endpoints") for key in slices]
        return [event.key._replace(resource="endpoints")]

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Mirror the Endpoints, or drop the mirror when they are not to be mirrored any more."""
        endpoints = registry.store.get(*key)
        service = registry.store.get("services", key.namespace, key.name)
        if endpoints is None or service is None or not _is_mirrored(service, endpoints):
            for one in self._index.slices_of(key.namespace, key.name):
                if labels_of(one).get(MANAGED_BY) == MIRROR:
                    delete_if_there(registry, _RESOURCE, key.namespace, one["metadata"]["name"])
            return None
        ours, stale = _own_slices(self._index, service, endpoints, MIRROR)
        plan = plan_slices(ours, mirrored_endpoints(endpoints))
        plan.delete.extend(stale)
        labels = {**labels_of(endpoints), SERVICE_NAME: key.name, MANAGED_BY: MIRROR}
        copied = {
            name: value
            for name, value in (endpoints["metadata"].get("annotations") or {}).items()
            if name not in (_LAST_APPLIED, TRIGGER_TIME)
        }
        self._writing = True
        try:
            _apply(registry, endpoints, ours, plan, labels, copied)
        finally:
            self._writing = False
        return None


def _is_mirrored(service: Object, endpoints: Object) -> bool:
    if service["spec"].get("selector") or is_terminating(endpoints):
        return False
    leader = "control-plane.alpha.kubernetes.io/leader" in (endpoints["metadata"].get("annotations") or {})
    return labels_of(endpoints).get(SKIP_MIRROR) != "true" and not leader


def mirrored_endpoints(endpoints: Object) -> dict[Group, dict[Identity, Endpoint]]:
    """Return what an Endpoints object says, in the form of slices."""
    desired: dict[Group, dict[Identity, Endpoint]] = {}
    for subset in endpoints.get("subsets") or ():
        ports = tuple(
            Port(port.get("name") or "", port.get("protocol") or "TCP", port["port"], port.get("appProtocol") or "")
            for port in subset.get("ports") or ()
        )
        both = [(address, True) for address in subset.get("addresses") or ()]
        both += [(address, False) for address in subset.get("notReadyAddresses") or ()]
        for address, ready in both[:_MAX_MIRRORED]:
            endpoint: Endpoint = {"addresses": [address["ip"]], "conditions": {"ready": ready}}
            endpoint.update(
                {name: address[name] for name in ("hostname", "targetRef", "nodeName") if address.get(name)}
            )
            group = Group(address_type(address["ip"]), ports)
            desired.setdefault(group, {})[identity_of(endpoint)] = endpoint
    return desired


def _service_of_slice(event: Event, managed_by: str) -> list[Key]:
    """Return the Service of a slice of ours that vanished or was changed."""
    labels = labels_of(event.object) if event.previous is None else labels_of(event.previous)
    if event.type is EventType.ADDED or labels.get(MANAGED_BY) != managed_by or SERVICE_NAME not in labels:
        return []
    return [Key("services", event.key.namespace, labels[SERVICE_NAME])]


def _own_slices(
    index: ClusterIndex, service: Object, owner: Object, managed_by: str
) -> tuple[list[Object], list[Object]]:
    """Return a Service's slices that are ours, and those of an earlier Service of the same name."""
    metadata = service["metadata"]
    ours: list[Object] = []
    stale: list[Object] = []
    for one in index.slices_of(metadata["namespace"], metadata["name"]):
        if labels_of(one).get(MANAGED_BY) == managed_by and not is_terminating(one):
            references = one["metadata"].get("ownerReferences") or ()
            owned = any(ref.get("uid") == owner["metadata"]["uid"] for ref in references)
            (ours if owned else stale).append(one)
    return ours, stale


def _apply(
    registry: Registry,
    owner: Object,
    existing: list[Object],
    plan: SlicePlan,
    labels: dict[str, str],
    annotations: dict[str, str],
) -> None:
    namespace, name = owner["metadata"]["namespace"], owner["metadata"]["name"]
    stamped = {**annotations, TRIGGER_TIME: registry.now()}
    for new in plan.create:
        metadata = {
            "generateName": f"{name}-",
            "namespace": namespace,
            "labels": labels,
            "annotations": stamped,
            "ownerReferences": [controller_reference(owner)],
        }
        registry.create(_RESOURCE, {**new, "metadata": metadata})
    going = {one["metadata"]["name"] for one in (*plan.update, *plan.delete)}
    # Labels and annotations of the owner may have changed where no endpoint has.
    relabelled = [
        one for one in existing if one["metadata"]["name"] not in going and not _has(one, labels, annotations)
    ]
    for one in (*plan.update, *relabelled):
        registry.update(_RESOURCE, {**one, "metadata": {**one["metadata"], "labels": labels, "annotations": stamped}})
    # Deleted last: meanwhile an endpoint may be there twice, and is never missing.
    for one in plan.delete:
        delete_if_there(registry, _RESOURCE, namespace, one["metadata"]["name"])


def _has(endpoint_slice: Object, labels: dict[str, str], annotations: dict[str, str]) -> bool:
    have = dict(endpoint_slice["metadata"].get("annotations") or {})
    have.pop(TRIGGER_TIME, None)
    return labels_of(endpoint_slice) == labels and have == annotations
