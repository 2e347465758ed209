"""ReplicaSets: as many pods as asked for.

Source: kubernetes pkg/controller/replicaset/replica_set.go, pkg/controller/controller_utils.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

from testbed.controllers.events import record_event
from testbed.controllers.index import ClusterIndex
from testbed.controllers.ownership import claim, possible_owners
from testbed.controllers.pods import (
    condition_of,
    is_active,
    is_available,
    is_ready,
    pod_from_template,
    seconds_until_available,
)
from testbed.controllers.status import delete_if_there, write_status
from testbed.errors import ApiError
from testbed.model.objects import Key, Object, is_terminating, labels_of, matches_labels, owner_uid
from testbed.registry import Registry
from testbed.store import Event

_RESOURCE = "replicasets.apps"
_COMPONENT = "replicaset-controller"
_BURST = 500  # pods made or deleted in one go, upstream's BurstReplicas
_PHASE_ORDER = {"Pending": 0, "Unknown": 1, "Running": 2}


class ReplicaSetController:
    """Creates and deletes pods, and counts them in the status."""

    watches: frozenset[str] | None = frozenset({_RESOURCE, "pods"})

    def __init__(self, index: ClusterIndex) -> None:
        self._index = index

    def keys(self, event: Event) -> Iterable[Key]:
        """Return the ReplicaSet itself, or those that own or might adopt a pod that changed."""
        if event.key.resource == _RESOURCE:
            return [event.key]
        pods = [event.object] if event.previous is None else [event.object, event.previous]
        if all(owner_uid(pod) for pod in pods):  # the usual case, and cheap
            refs = [ref for pod in pods for ref in pod["metadata"]["ownerReferences"]]
            return {
                Key(_RESOURCE, event.key.namespace, ref["name"])
                for ref in refs
                if ref.get("controller") and ref["kind"] == "ReplicaSet"
            }
        owners = self._index.in_namespace(_RESOURCE, event.key.namespace)
        return {
            Key(_RESOURCE, event.key.namespace, owner["metadata"]["name"])
            for pod in pods
            for owner in possible_owners(owners, pod)
        }

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Make the number of pods right by at most a burst, then write down what there is."""
        replica_set = registry.store.get(*key)
        if replica_set is None:
            return None
        pods = [pod for pod in claim(registry, self._index, replica_set, "pods") if is_active(pod)]
        surplus = len(pods) - replica_set["spec"].get("replicas", 1)
        failure: ApiError | None = None
        if not is_terminating(replica_set):
            if surplus < 0:
                failure = self._create(registry, replica_set, min(-surplus, _BURST))
            elif surplus > 0:
                self._delete(registry, replica_set, pods, min(surplus, _BURST))
            pods = [pod for pod in self._index.owned("pods", replica_set["metadata"]["uid"]) if is_active(pod)]
        write_status(registry, key, replica_set_status(replica_set, pods, registry.now, failure))
        if failure is not None:
            raise failure
        if abs(surplus) > _BURST:
            return 0.0
        return _next_look(pods, int(replica_set["spec"].get("minReadySeconds") or 0), registry.now)

    def _create(self, registry: Registry, replica_set: Object, count: int) -> ApiError | None:
        pod = pod_from_template(replica_set["spec"].get("template", {}), replica_set)
        for _ in range(count):
            try:
                created = registry.create("pods", pod)
            except ApiError as error:
                if not any(cause.reason == "NamespaceTerminating" for cause in error.causes):
                    record_event(
                        registry, replica_set, "Warning", "FailedCreate", f"Error creating: {error}", _COMPONENT
                    )
                return error
            message = f"Created pod: {created['metadata']['name']}"
            record_event(registry, replica_set, "Normal", "SuccessfulCreate", message, _COMPONENT)
        return None

    def _delete(self, registry: Registry, replica_set: Object, pods: Sequence[Object], count: int) -> None:
        uid = replica_set["metadata"]["uid"]

        def doubled_up(node: str) -> int:
            return self._index.count_pods_on(node, uid)

        for pod in pods_to_delete(pods, count, doubled_up):
            name = pod["metadata"]["name"]
            delete_if_there(registry, "pods", pod["metadata"]["namespace"], name, uid=pod["metadata"]["uid"])
            record_event(registry, replica_set, "Normal", "SuccessfulDelete", f"Deleted pod: {name}", _COMPONENT)


def pods_to_delete(pods: Sequence[Object], count: int, doubled_up: Callable[[str], int]) -> list[Object]:
    """Return which of the pods go first, in the order of Kubernetes' ActivePodsWithRanks.

    Not assigned, then pending, then not ready, then cheaper (annotation pod-deletion-cost), then on a node with more
    pods of the same owner, then ready for a shorter time, then restarted more often, then younger.

    Args:
        pods: Oldest first; of two that are the same in all this, the later one goes first.
        doubled_up: How many pods of the same owner a node has.
    """

    def rank(pod: Object) -> tuple[Any, ...]:
        status = pod.get("status") or {}
        node = pod.get("spec", {}).get("nodeName", "")
        ready = is_ready(pod)
        return (
            bool(node),
            _PHASE_ORDER.get(status.get("phase", "Pending"), 0),
            ready,
            _deletion_cost(pod),
            -doubled_up(node) if node else 0,
            -_timestamp((condition_of(pod, "Ready") or {}).get("lastTransitionTime")) if ready else 0.0,
            -max((one.get("restartCount", 0) for one in status.get("containerStatuses") or ()), default=0),
            -_timestamp(pod["metadata"].get("creationTimestamp")),
        )

    youngest_first = list(reversed(pods))  # timestamps are whole seconds: sorting is stable, and settles the rest
    return sorted(youngest_first, key=rank)[:count]


def _deletion_cost(pod: Object) -> int:
    text = (pod["metadata"].get("annotations") or {}).get("controller.kubernetes.io/pod-deletion-cost", "0")
    try:
        return int(text)
    except ValueError:
        return 0


def _timestamp(text: str | None) -> float:
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def replica_set_status(
    replica_set: Object, pods: Sequence[Object], now: Callable[[], str], failure: ApiError | None = None
) -> Object:
    """Return the status of a ReplicaSet with these active pods.

    Args:
        failure: Why a pod could not be created just now.
    """
    spec = replica_set["spec"]
    template_labels = spec.get("template", {}).get("metadata", {}).get("labels") or {}
    min_ready_s = int(spec.get("minReadySeconds") or 0)
    counts = {
        "replicas": len(pods),
        "fullyLabeledReplicas": sum(matches_labels(template_labels, labels_of(pod)) for pod in pods),
        "readyReplicas": sum(is_ready(pod) for pod in pods),
        "availableReplicas": sum(is_available(pod, min_ready_s, now) for pod in pods),
    }
    status: Object = {name: count for name, count in counts.items() if count or name == "replicas"}
    status["observedGeneration"] = replica_set["metadata"].get("generation", 0)
    if failure is not None:
        known = condition_of(replica_set, "ReplicaFailure")
        since = known["lastTransitionTime"] if known else now()
        status["conditions"] = [
            {
                "type": "ReplicaFailure",
                "status": "True",
                "reason": "FailedCreate",
                "message": str(failure),
                "lastTransitionTime": since,
            }
        ]
    return status


def _next_look(pods: Sequence[Object], min_ready_s: int, now: Callable[[], str]) -> float | None:
    if not min_ready_s:
        return None
    at = now()
    waits = [wait for pod in pods if (wait := seconds_until_available(pod, min_ready_s, at))]
    return min(waits, default=None)
