"""The scheduler: binds pods to nodes.

It scores little: what counts is that pods only go where they may, and that they spread.
Pods with spec.nodeName are the kubelet's at once; pod (anti-)affinity and topologySpreadConstraints are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable

from testbed.controllers.events import record_event
from testbed.controllers.index import ClusterIndex
from testbed.controllers.placement import best_node, failure_message, node_taints, obstacle
from testbed.controllers.pods import condition_of, is_finished, with_condition
from testbed.controllers.status import write_status
from testbed.model.objects import Key, Object, is_terminating, labels_of, owner_uid
from testbed.registry import Registry
from testbed.store import Event, EventType

NAME = "default-scheduler"


class Scheduler:
    """Gives each pod a node, or says in an event why none will do."""

    watches: frozenset[str] | None = frozenset({"pods", "nodes"})

    def __init__(self, index: ClusterIndex) -> None:
        self._index = index
        self._unplaced: dict[Key, None] = {}

    def keys(self, event: Event) -> Iterable[Key]:
        """Return pods without a node; when room may have come up, all that could not be placed."""
        if event.key.resource == "nodes":
            return list(self._unplaced) if _may_help(event) else ()
        pod = event.object
        if event.type is EventType.DELETED:
            self._unplaced.pop(event.key, None)
            return list(self._unplaced) if pod.get("spec", {}).get("nodeName") else ()
        if pod.get("spec", {}).get("nodeName"):
            ended = event.previous is not None and is_finished(pod) and not is_finished(event.previous)
            return list(self._unplaced) if ended else ()
        return [event.key] if event.previous is None or _needs_change(event.previous, pod) else ()

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Bind one pod, if it is still waiting."""
        pod = registry.store.get(*key)
        if pod is None or not _is_waiting(pod):
            self._unplaced.pop(key, None)
            return None
        nodes = registry.store.list("nodes")
        obstacles = [self._obstacle(pod, node) for node in nodes]
        possible = [node for node, found in zip(nodes, obstacles, strict=True) if found is None]
        if not possible:
            self._unplaced[key] = None
            self._report(registry, key, pod, failure_message([found for found in obstacles if found]))
            return None
        self._unplaced.pop(key, None)
        owner = owner_uid(pod)
        node = best_node(
            pod,
            possible,
            lambda name: self._index.count_pods_on(name, owner),
            lambda name: self._index.count_pods_on(name),
        )
        name = node["metadata"]["name"]
        bind(registry, pod, name)
        message = f"Successfully assigned {key.namespace}/{key.name} to {name}"
        record_event(registry, pod, "Normal", "Scheduled", message, NAME)
        return None

    def _obstacle(self, pod: Object, node: Object) -> str | None:
        name = node["metadata"]["name"]
        return obstacle(pod, node, lambda: self._index.pods_on(name), lambda: self._index.count_pods_on(name))

    def _report(self, registry: Registry, key: Key, pod: Object, message: str) -> None:
        record_event(registry, pod, "Warning", "FailedScheduling", message, NAME)
        known = condition_of(pod, "PodScheduled")
        new = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        if known is not None and known.items() >= new.items():
            return
        was_false = known is not None and known["status"] == "False"
        since = known["lastTransitionTime"] if known and was_false else registry.now()
        write_status(registry, key, _status_with(pod, {**new, "lastTransitionTime": since}))


def bind(registry: Registry, pod: Object, node: str) -> None:
    """Put a pod on a node, and say so in its conditions."""
    bound = registry.update("pods", {**pod, "spec": {**pod["spec"], "nodeName": node}})
    if (condition_of(bound, "PodScheduled") or {}).get("status") != "True":
        condition = {"type": "PodScheduled", "status": "True", "lastTransitionTime": registry.now()}
        write_status(
            registry, Key("pods", pod["metadata"]["namespace"], pod["metadata"]["name"]), _status_with(bound, condition)
        )


def _status_with(pod: Object, condition: Object) -> Object:
    status = pod.get("status") or {}
    return {**status, "conditions": with_condition(status.get("conditions") or [], condition)}


def _is_waiting(pod: Object) -> bool:
    spec = pod.get("spec", {})
    return not (
        spec.get("nodeName")
        or is_terminating(pod)
        or is_finished(pod)
        or spec.get("schedulerName", NAME) != NAME
        or spec.get("schedulingGates")
    )


def _needs_change(before: Object, after: Object) -> bool:
    return before["spec"] != after["spec"] or labels_of(before) != labels_of(after)


def _may_help(event: Event) -> bool:
    """Say whether a change of a node may make room: a heartbeat does not."""
    if event.type is EventType.DELETED or event.previous is None:
        return True
    before, after = event.previous, event.object
    return (
        before.get("spec") != after.get("spec")
        or labels_of(before) != labels_of(after)
        or node_taints(before) != node_taints(after)
    )
