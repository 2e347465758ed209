"""What a cluster's objects say about conditions and membership. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.model.objects import Object, is_terminating, labels_of, matches_labels, name_of, namespace_of
from testbed.model.scenario import Condition, Selector

SERVICE_LABEL = "kubernetes.io/service-name"
TEMPLATE_HASH_LABEL = "pod-template-hash"


def selected(objects: Sequence[Object], selector: Selector, *, with_owned: bool = False) -> list[Object]:
    """Return the objects of a selector, by name or labels; ``with_owned``: or the pods of the workload of that name."""
    if selector.labels:
        return [obj for obj in objects if matches_labels(dict(selector.labels), labels_of(obj))]
    exact = [obj for obj in objects if name_of(obj) == selector.name]
    if exact or not with_owned:
        return exact
    return [obj for obj in objects if selector.name in _workloads(obj)]


def _workloads(pod: Object) -> set[str]:
    """Return the names of the workloads that made a pod: its owner, and the Deployment that owner belongs to.

    A Deployment's ReplicaSet is called DEPLOYMENT-HASH, and its pods carry the hash as a label.
    """
    owners = {ref["name"] for ref in pod["metadata"].get("ownerReferences") or () if ref.get("controller")}
    template_hash = labels_of(pod).get(TEMPLATE_HASH_LABEL)
    suffix = f"-{template_hash}"
    deployments = {owner.removesuffix(suffix) for owner in owners if template_hash and owner.endswith(suffix)}
    return owners | deployments


def condition_of(obj: Object, kind: str) -> str:
    """Return the status of one of an object's conditions: True, False, Unknown, or '' when it has none of that kind."""
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return next((str(found["status"]) for found in conditions if found["type"] == kind), "")


def is_ready(pod: Object) -> bool:
    return condition_of(pod, "Ready") == "True" and not is_terminating(pod)


def holds(obj: Object, condition: Condition) -> bool:
    """Say whether one object is in a condition (``deleted`` and ``endpoints`` are about more than one object)."""
    status = obj.get("status") or {}
    match condition:
        case Condition.READY:
            return _is_rolled_out(obj) if obj.get("kind") in _WORKLOADS else is_ready(obj)
        case Condition.AVAILABLE:
            return _is_rolled_out(obj)
        case Condition.RUNNING:
            return bool(status.get("phase") == "Running") and not is_terminating(obj)
        case Condition.SUCCEEDED:
            return bool(status.get("phase") == "Succeeded") or condition_of(obj, "Complete") == "True"
        case _:
            raise AssertionError(condition)


_WORKLOADS = ("Deployment", "ReplicaSet", "DaemonSet")


def _is_rolled_out(obj: Object) -> bool:
    """Say whether a workload's controller has seen its latest form and all of its pods are new and available."""
    status = obj.get("status") or {}
    if status.get("observedGeneration", 0) < obj["metadata"].get("generation", 0):
        return False
    if obj.get("kind") == "DaemonSet":
        wanted = status.get("desiredNumberScheduled", 0)
        current = (status.get("updatedNumberScheduled"), status.get("numberAvailable"))
        return bool(wanted) and current == (wanted, wanted)
    wanted = obj["spec"].get("replicas", 1)
    if obj.get("kind") == "ReplicaSet":
        counts = {status.get("availableReplicas", 0), status.get("replicas", 0)}
    else:
        counts = {status.get(name, 0) for name in ("updatedReplicas", "replicas", "availableReplicas")}
    return counts == {wanted}


def describe(obj: Object) -> str:
    """Return an object and its state in a few words, for a failed wait."""
    status = obj.get("status") or {}
    kind = obj.get("kind", "")
    if kind == "Pod":
        reasons = [
            state["waiting"].get("reason", "")
            for state in (found.get("state") or {} for found in status.get("containerStatuses") or ())
            if "waiting" in state
        ]
        words = "ready" if is_ready(obj) else "not ready"
        if is_terminating(obj):
            words = "terminating"
        return f"{name_of(obj)} {status.get('phase', 'Pending')}, {' '.join([words, *reasons])}"
    if kind == "DaemonSet":
        return f"{name_of(obj)} {status.get('numberAvailable', 0)}/{status.get('desiredNumberScheduled', 0)} available"
    if kind in _WORKLOADS:
        wanted = obj["spec"].get("replicas", 1)
        available, updated = status.get("availableReplicas", 0), status.get("updatedReplicas", 0)
        was_updated = "" if kind == "ReplicaSet" else f", {updated} updated"
        return f"{name_of(obj)} {available}/{wanted} available{was_updated}"
    if kind == "Node":
        return f"{name_of(obj)} {'ready' if is_ready(obj) else 'not ready'}"
    if kind == "Job":
        counts = ", ".join(f"{status.get(word) or 0} {word}" for word in ("active", "succeeded", "failed"))
        return f"{name_of(obj)} {counts}"
    return name_of(obj)


def ready_endpoints(slices: Sequence[Object]) -> set[str]:
    """Return the addresses that are ready in some EndpointSlices."""
    return {
        address
        for found in slices
        for endpoint in found.get("endpoints") or ()
        if (endpoint.get("conditions") or {}).get("ready") is not False  # unknown means ready (discovery/v1)
        for address in endpoint.get("addresses") or ()
    }


def pod_name(pod: Object) -> str:
    return f"{namespace_of(pod)}/{name_of(pod)}"
