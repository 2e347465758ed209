"""Nodes that stop answering: noticed, marked, tainted, and emptied when their pods tolerate no more.

::

    Lease not renewed for the grace period ─▶ conditions Unknown ─▶ taints unreachable ─▶ pods not ready ─▶ endpoints
    Ready is False                         ─▶                       taints not-ready
    taint NoExecute + tolerationSeconds    ─▶ pods deleted (which a kubelet that is down does not carry out)

Source: kubernetes pkg/controller/nodelifecycle, pkg/controller/tainteviction, pkg/controller/podgc (v1.30).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from testbed.controllers.events import record_event
from testbed.controllers.index import ClusterIndex
from testbed.controllers.placement import tolerates
from testbed.controllers.pods import condition_of, is_finished, is_ready, seconds_since, with_condition
from testbed.controllers.status import delete_if_there, write_status
from testbed.model.cluster import ClusterConfig
from testbed.model.objects import Key, Object, is_terminating
from testbed.registry import Registry
from testbed.store import Event, EventType

LEASES = "leases.coordination.k8s.io"
LEASE_NAMESPACE = "kube-node-lease"
_COMPONENT = "node-controller"
_UNREACHABLE, _NOT_READY = "node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"
_UNSCHEDULABLE = "node.kubernetes.io/unschedulable"
_NETWORK = "node.kubernetes.io/network-unavailable"
_PRESSURES = {"MemoryPressure": "memory", "DiskPressure": "disk", "PIDPressure": "pid"}
_JUDGED = ("Ready", "MemoryPressure", "DiskPressure", "PIDPressure")
_QUARANTINE_S = 40.0  # podgc: how long a node must be missing before its pods are


def condition_taints(node: Object) -> list[Object]:
    """Return the taints that follow from a node's conditions and spec.unschedulable; none has a time yet."""
    taints: list[Object] = []
    ready = (condition_of(node, "Ready") or {}).get("status", "False")
    if ready != "True":
        key = _UNREACHABLE if ready == "Unknown" else _NOT_READY
        taints += [{"key": key, "effect": "NoSchedule"}, {"key": key, "effect": "NoExecute"}]
    if (condition_of(node, "NetworkUnavailable") or {}).get("status") == "True":
        taints.append({"key": _NETWORK, "effect": "NoSchedule"})
    for condition, name in _PRESSURES.items():
        if (condition_of(node, condition) or {}).get("status") == "True":
            taints.append({"key": f"node.kubernetes.io/{name}-pressure", "effect": "NoSchedule"})
    if node.get("spec", {}).get("unschedulable"):
        taints.append({"key": _UNSCHEDULABLE, "effect": "NoSchedule"})
    return taints


_OURS = frozenset(
    {_UNREACHABLE, _NOT_READY, _NETWORK, _UNSCHEDULABLE}
    | {f"node.kubernetes.io/{name}-pressure" for name in _PRESSURES.values()}
)


def wanted_taints(node: Object, now: str) -> list[Object]:
    """Return a node's taints as they should be: other people's as they are, ours by its conditions."""
    have = node.get("spec", {}).get("taints") or []
    known = {(one["key"], one.get("effect")): one for one in have if one["key"] in _OURS}
    ours = [known.get((one["key"], one["effect"])) or {**one, "timeAdded": now} for one in condition_taints(node)]
    return [one for one in have if one["key"] not in _OURS] + ours


def unknown_conditions(node: Object, now: str) -> list[Object]:
    """Return the conditions of a node that has stopped posting its status."""
    conditions: list[Object] = list((node.get("status") or {}).get("conditions") or ())
    for kind in _JUDGED:
        before = condition_of(node, kind)
        if before is not None and before.get("status") == "Unknown":
            continue
        if before is None:
            reason, message = "NodeStatusNeverUpdated", "Kubelet never posted node status."
        else:
            reason, message = "NodeStatusUnknown", "Kubelet stopped posting node status."
        changed = {**(before or {}), "type": kind, "status": "Unknown", "reason": reason, "message": message}
        conditions = with_condition(conditions, {**changed, "lastTransitionTime": now})
    return conditions


@dataclass(slots=True)
class _Heartbeat:
    """The last sign of life of a node: what it looked like, and when we saw it (RFC 3339)."""

    sign: str
    seen: str


class NodeLifecycleController:
    """Watches the heartbeats of nodes. Without a grace period in the configuration every node is taken to be alive."""

    watches: frozenset[str] | None = frozenset({"nodes", LEASES, "pods"})

    def __init__(self, index: ClusterIndex, config: ClusterConfig) -> None:
        self._index = index
        self._grace_s = config.node_monitor_grace_s
        self._heartbeats: dict[str, _Heartbeat] = {}
        self._missing: dict[str, str] = {}  # nodes that are gone, and since when

    def keys(self, event: Event) -> Iterable[Key]:
        """Return the node that a change is about; of pods, those that come to a node which is not there or not ready."""
        if event.key.resource == LEASES:
            return [Key("nodes", "", event.key.name)] if event.key.namespace == LEASE_NAMESPACE else ()
        if event.key.resource == "nodes":
            return [event.key]
        node = event.object["spec"].get("nodeName")
        bound = node and event.type is not EventType.DELETED
        if bound and (event.previous is None or not event.previous["spec"].get("nodeName")):
            return [Key("nodes", "", node)]
        return ()

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Judge one node; return when its grace is over."""
        node = registry.store.get(*key)
        if node is None:
            return self._forget(key, registry)
        self._missing.pop(key.name, None)
        left_s = self._time_left(node, registry)
        if left_s is not None and left_s <= 0:
            self._mark_unknown(key, node, registry)
            node = registry.get("nodes", "", key.name)
        taints = wanted_taints(node, registry.now())
        if taints != (node.get("spec", {}).get("taints") or []):
            node = registry.update("nodes", {**node, "spec": {**node.get("spec", {}), "taints": taints}})
        if (condition_of(node, "Ready") or {}).get("status") == "Unknown":
            self._mark_pods(key.name, registry)
        return left_s if left_s is not None and left_s > 0 else None

    def _time_left(self, node: Object, registry: Registry) -> float | None:
        """Return for how long the node may still be silent; None when that is not watched."""
        name = node["metadata"]["name"]
        lease = registry.store.get(LEASES, LEASE_NAMESPACE, name)
        ready = condition_of(node, "Ready") or {}
        sign = f"{((lease or {}).get('spec') or {}).get('renewTime')} {ready.get('lastHeartbeatTime')}"
        known = self._heartbeats.get(name)
        now = registry.now()
        if known is None or known.sign != sign:
            if known is None:
                message = f"Node {name} event: Registered Node {name} in Controller"
                record_event(registry, node, "Normal", "RegisteredNode", message, _COMPONENT)
            known = self._heartbeats[name] = _Heartbeat(sign, now)
        if self._grace_s is None:
            return None
        return self._grace_s - seconds_since(known.seen, now)

    def _mark_unknown(self, key: Key, node: Object, registry: Registry) -> None:
        conditions = unknown_conditions(node, registry.now())
        before = (node.get("status") or {}).get("conditions") or []
        if conditions == before:
            return
        write_status(registry, key, {**(node.get("status") or {}), "conditions": conditions})
        if (condition_of(node, "Ready") or {}).get("status") == "True":
            message = f"Node {key.name} status is now: NodeNotReady"
            record_event(registry, node, "Normal", "NodeNotReady", message, _COMPONENT)

    def _mark_pods(self, node: str, registry: Registry) -> None:
        """Say of each pod of a silent node that it is not ready, which takes it out of its Services."""
        for pod in self._index.pods_on(node):
            if not is_ready(pod):
                continue
            key = Key("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
            status = pod.get("status") or {}
            condition = {**(condition_of(pod, "Ready") or {}), "status": "False", "lastTransitionTime": registry.now()}
            conditions = with_condition(status.get("conditions") or [], condition)
            write_status(registry, key, {**status, "conditions": conditions})
            record_event(registry, pod, "Warning", "NodeNotReady", "Node is not ready", _COMPONENT)

    def _forget(self, key: Key, registry: Registry) -> float | None:
        """Remove the pods of a node that has been missing for a while; nobody else could end them."""
        if self._heartbeats.pop(key.name, None) is not None:
            delete_if_there(registry, LEASES, LEASE_NAMESPACE, key.name)
        pods = self._index.pods_on(key.name)
        if not pods:
            return None
        since = self._missing.setdefault(key.name, registry.now())
        left_s = _QUARANTINE_S - seconds_since(since, registry.now())
        if left_s > 0:
            return left_s
        del self._missing[key.name]
        for pod in pods:
            metadata = pod["metadata"]
            registry.delete("pods", metadata["namespace"], metadata["name"], grace_s=0)
        return None


def seconds_to_stay(pod: Object, taints: Sequence[Object], now: str) -> float | None:
    """Return how long a pod may stay on a node with these taints: 0 to go now, None for ever.

    Each NoExecute taint must be tolerated; the shortest tolerationSeconds counts from when the taint was added.
    """
    tolerations: list[Object] = pod["spec"].get("tolerations") or []
    stays: list[float] = []
    for taint in taints:
        if taint.get("effect") != "NoExecute":
            continue
        covering = [one for one in tolerations if tolerates([one], taint)]
        if not covering:
            return 0.0
        limits = [one["tolerationSeconds"] for one in covering if one.get("tolerationSeconds") is not None]
        if limits:
            since = taint.get("timeAdded") or now
            stays.append(max(min(limits) - seconds_since(since, now), 0.0))
    return min(stays, default=None)


class TaintEvictionController:
    """Deletes pods that do not tolerate a NoExecute taint of their node, at once or when their time is over."""

    watches: frozenset[str] | None = frozenset({"nodes", "pods"})

    def __init__(self, index: ClusterIndex) -> None:
        self._index = index
        self._marked: set[Key] = set()

    def keys(self, event: Event) -> Iterable[Key]:
        """Return the pods of a node whose taints changed, and pods that came to a node or changed their tolerations."""
        if event.key.resource == "nodes":
            before = (event.previous or {}).get("spec", {}).get("taints") or []
            now = [] if event.type is EventType.DELETED else event.object.get("spec", {}).get("taints") or []
            if before == now:
                return ()
            return [
                Key("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
                for pod in self._index.pods_on(event.key.name)
            ]
        if event.type is EventType.DELETED:
            self._marked.discard(event.key)
            return ()
        if event.previous is not None and event.previous["spec"] == event.object["spec"]:
            return ()
        return [event.key] if event.object["spec"].get("nodeName") else ()

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Delete the pod, or say when to look again."""
        pod = registry.store.get(*key)
        if pod is None or is_terminating(pod) or is_finished(pod):
            return None
        node = registry.store.get("nodes", "", pod["spec"].get("nodeName", ""))
        taints = (node or {}).get("spec", {}).get("taints") or []
        left_s = seconds_to_stay(pod, taints, registry.now())
        name = f"{key.namespace}/{key.name}"
        if left_s is None:
            if key in self._marked:
                self._marked.discard(key)
                message = f"Cancelling deletion of Pod {name}"
                record_event(registry, pod, "Normal", "TaintManagerEviction", message, "taint-eviction-controller")
            return None
        if left_s > 0:
            self._marked.add(key)
            return left_s
        self._marked.discard(key)
        message = f"Marking for deletion Pod {name}"
        record_event(registry, pod, "Normal", "TaintManagerEviction", message, "taint-eviction-controller")
        status = pod.get("status") or {}
        condition = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "DeletionByTaintManager",
            "message": "Taint manager: deleting due to NoExecute taint",
            "lastTransitionTime": registry.now(),
        }
        write_status(registry, key, {**status, "conditions": with_condition(status.get("conditions") or [], condition)})
        delete_if_there(registry, "pods", key.namespace, key.name)
        return None
