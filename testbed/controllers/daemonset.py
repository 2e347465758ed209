"""DaemonSets: one pod on every node that may have it.

As upstream, the controller makes the pods and names each one's node in a required node affinity; the scheduler binds
them, so ports that are taken keep a daemon pod waiting like any other.

Source: kubernetes pkg/controller/daemon/{daemon_controller,update}.go, util/daemonset_util.go (v1.30). There are no
ControllerRevisions: the hash that they would carry is the template's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from testbed.controllers.events import record_event
from testbed.controllers.index import ClusterIndex
from testbed.controllers.ownership import claim, possible_owners
from testbed.controllers.placement import matches_affinity, node_taints, untolerated
from testbed.controllers.pods import is_available, is_ready, pod_from_template, seconds_until_available
from testbed.controllers.rolling import scaled_value
from testbed.controllers.status import delete_if_there, write_status
from testbed.controllers.template_hash import template_hash
from testbed.model.objects import Key, Object, is_terminating, labels_of
from testbed.registry import Registry
from testbed.store import Event, EventType

_RESOURCE = "daemonsets.apps"
_COMPONENT = "daemonset-controller"
HASH_LABEL = "controller-revision-hash"
_TOLERATED = (
    ("node.kubernetes.io/not-ready", "NoExecute"),
    ("node.kubernetes.io/unreachable", "NoExecute"),
    ("node.kubernetes.io/disk-pressure", "NoSchedule"),
    ("node.kubernetes.io/memory-pressure", "NoSchedule"),
    ("node.kubernetes.io/pid-pressure", "NoSchedule"),
    ("node.kubernetes.io/unschedulable", "NoSchedule"),
)
_TOLERATED_ON_HOST_NETWORK = ("node.kubernetes.io/network-unavailable", "NoSchedule")


@dataclass(frozen=True, slots=True)
class NodeFit:
    """Whether a node should get a daemon pod, and whether one that is there may stay."""

    should_run: bool
    may_stay: bool


class DaemonSetController:
    """Makes, replaces and deletes daemon pods."""

    watches: frozenset[str] | None = frozenset({_RESOURCE, "pods", "nodes"})

    def __init__(self, index: ClusterIndex) -> None:
        self._index = index
        self._known: dict[Key, None] = {}

    def keys(self, event: Event) -> Iterable[Key]:
        """Return the DaemonSet itself, the owner of a pod, or all when a node changed in a way that matters."""
        if event.key.resource == _RESOURCE:
            self._known[event.key] = None
            if event.type is EventType.DELETED:
                del self._known[event.key]
            return [event.key]
        if event.key.resource == "nodes":
            return list(self._known) if _node_matters(event) else ()
        if not self._known:
            return ()
        owners = self._index.in_namespace(_RESOURCE, event.key.namespace)
        pods = [event.object] if event.previous is None else [event.object, event.previous]
        return {
            Key(_RESOURCE, event.key.namespace, owner["metadata"]["name"])
            for pod in pods
            for owner in possible_owners(owners, pod)
        }

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Make the pods right on every node, then replace old ones as far as the strategy allows."""
        daemon_set = registry.store.get(*key)
        if daemon_set is None:
            return None
        claim(registry, self._index, daemon_set, "pods")
        nodes = registry.store.list("nodes")
        fits = {node["metadata"]["name"]: node_fit(daemon_set, node) for node in nodes}
        wanted_hash = template_hash(daemon_set["spec"]["template"])
        if not is_terminating(daemon_set):
            self._manage(registry, daemon_set, fits, wanted_hash)
            if (daemon_set["spec"].get("updateStrategy") or {}).get("type", "RollingUpdate") == "RollingUpdate":
                for pod in pods_to_replace(daemon_set, fits, self._by_node(daemon_set), wanted_hash, registry.now):
                    self._delete(registry, daemon_set, pod)
        by_node = self._by_node(daemon_set)
        write_status(registry, key, daemon_set_status(daemon_set, fits, by_node, wanted_hash, registry.now))
        min_ready_s = int(daemon_set["spec"].get("minReadySeconds") or 0)
        if not min_ready_s:
            return None
        pods = [pod for there in by_node.values() for pod in there]
        waits = [wait for pod in pods if (wait := seconds_until_available(pod, min_ready_s, registry.now()))]
        return min(waits, default=None)

    def _by_node(self, daemon_set: Object) -> dict[str, list[Object]]:
        by_node: dict[str, list[Object]] = {}
        for pod in self._index.owned("pods", daemon_set["metadata"]["uid"]):
            by_node.setdefault(target_node(pod), []).append(pod)
        return by_node

    def _manage(self, registry: Registry, daemon_set: Object, fits: dict[str, NodeFit], wanted_hash: str) -> None:
        by_node = self._by_node(daemon_set)
        for node, pods in by_node.items():
            fit = fits.get(node, NodeFit(should_run=False, may_stay=False))
            active = [pod for pod in pods if not is_terminating(pod)]
            for pod in active:
                if (pod.get("status") or {}).get("phase") == "Failed":
                    told = f"Found failed daemon pod {owner_path(pod)} on node {node}, will try to kill it"
                    record_event(registry, daemon_set, "Warning", "FailedDaemonPod", told, _COMPONENT)
                    self._delete(registry, daemon_set, pod)
                elif not fit.may_stay:
                    self._delete(registry, daemon_set, pod)
            if fit.may_stay:
                for surplus in active[1:]:  # the oldest stays
                    self._delete(registry, daemon_set, surplus)
        for node, fit in fits.items():
            # One that is ending must be gone first: a node never has two (maxSurge is 0).
            if fit.should_run and not self._has_pod(by_node, node):
                created = registry.create("pods", daemon_pod(daemon_set, node, wanted_hash))
                told = f"Created pod: {created['metadata']['name']}"
                record_event(registry, daemon_set, "Normal", "SuccessfulCreate", told, _COMPONENT)

    def _has_pod(self, by_node: dict[str, list[Object]], node: str) -> bool:
        return any(self._index.exists(pod["metadata"]["uid"]) for pod in by_node.get(node, ()))

    def _delete(self, registry: Registry, daemon_set: Object, pod: Object) -> None:
        name = pod["metadata"]["name"]
        delete_if_there(registry, "pods", pod["metadata"]["namespace"], name, uid=pod["metadata"]["uid"])
        record_event(registry, daemon_set, "Normal", "SuccessfulDelete", f"Deleted pod: {name}", _COMPONENT)


# --- decisions -------------------------------------------------------------------------------------------------------


def owner_path(pod: Object) -> str:
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"


def daemon_tolerations(pod_spec: Object) -> list[Object]:
    """Return a template's tolerations with those that every daemon pod has."""
    wanted = [*_TOLERATED, *([_TOLERATED_ON_HOST_NETWORK] if pod_spec.get("hostNetwork") else [])]
    automatic = [{"key": key, "operator": "Exists", "effect": effect} for key, effect in wanted]
    own = list(pod_spec.get("tolerations") or ())
    return [*own, *(one for one in automatic if one not in own)]


def node_fit(daemon_set: Object, node: Object) -> NodeFit:
    """Decide about one node, by name, labels and taints."""
    spec = daemon_set["spec"]["template"].get("spec", {})
    wanted = spec.get("nodeName")
    if (wanted and wanted != node["metadata"]["name"]) or not matches_affinity(spec, node):
        return NodeFit(should_run=False, may_stay=False)
    tolerations = daemon_tolerations(spec)
    taints = node_taints(node)
    may_stay = untolerated(taints, tolerations, ("NoExecute",)) is None
    return NodeFit(untolerated(taints, tolerations, ("NoSchedule", "NoExecute")) is None, may_stay)


def daemon_pod(daemon_set: Object, node: str, wanted_hash: str) -> Object:
    """Return the pod for a node: tied to it by affinity, with the tolerations of daemon pods."""
    pod = pod_from_template(daemon_set["spec"]["template"], daemon_set, {HASH_LABEL: wanted_hash})
    spec = pod["spec"]
    spec["tolerations"] = daemon_tolerations(spec)
    affinity = dict(spec.get("affinity") or {})
    term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
    # It replaces what the template requires of nodes: that this node meets it has been decided.
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    spec["affinity"] = {**affinity, "nodeAffinity": {**(affinity.get("nodeAffinity") or {}), **required}}
    return pod


def target_node(pod: Object) -> str:
    """Return the node that a daemon pod is on or waits for."""
    spec = pod.get("spec", {})
    if spec.get("nodeName"):
        return str(spec["nodeName"])
    required = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    ) or {}
    for term in required.get("nodeSelectorTerms") or ():
        for wanted in term.get("matchFields") or ():
            if wanted.get("key") == "metadata.name" and wanted.get("values"):
                return str(wanted["values"][0])
    return ""


def pods_to_replace(
    daemon_set: Object,
    fits: dict[str, NodeFit],
    by_node: dict[str, list[Object]],
    wanted_hash: str,
    now: Callable[[], str],
) -> list[Object]:
    """Return the old pods that may go now: at most maxUnavailable nodes are without an available pod.

    Old pods that are not available go at once: that makes nothing worse.
    """
    spec = daemon_set["spec"]
    rolling = (spec.get("updateStrategy") or {}).get("rollingUpdate") or {}
    desired = [node for node, fit in fits.items() if fit.should_run]
    allowed = max(scaled_value(rolling.get("maxUnavailable", 1), len(desired), round_up=True), 1)
    min_ready_s = int(spec.get("minReadySeconds") or 0)
    at_once: list[Object] = []
    candidates: list[Object] = []
    unavailable = 0
    for node in desired:
        pods = [pod for pod in by_node.get(node, ()) if not is_terminating(pod)]
        if not pods:
            unavailable += 1
            continue
        pod = pods[0]
        available = is_available(pod, min_ready_s, now)
        unavailable += not available
        if labels_of(pod).get(HASH_LABEL) != wanted_hash:
            (candidates if available else at_once).append(pod)
    return at_once + candidates[: max(allowed - unavailable, 0)]


def daemon_set_status(
    daemon_set: Object,
    fits: dict[str, NodeFit],
    by_node: dict[str, list[Object]],
    wanted_hash: str,
    now: Callable[[], str],
) -> Object:
    """Return the status: nodes that should have a pod, have one, and how far theirs are."""
    min_ready_s = int(daemon_set["spec"].get("minReadySeconds") or 0)
    counts = dict.fromkeys(("desired", "current", "misplaced", "ready", "available", "updated"), 0)
    for node, fit in fits.items():
        pods = [pod for pod in by_node.get(node, ()) if not is_terminating(pod)]
        counts["desired"] += fit.should_run
        if not pods:
            continue
        if not fit.should_run:
            counts["misplaced"] += 1
            continue
        pod = pods[0]
        counts["current"] += 1
        counts["ready"] += is_ready(pod)
        counts["available"] += is_available(pod, min_ready_s, now)
        counts["updated"] += labels_of(pod).get(HASH_LABEL) == wanted_hash
    status: Object = {
        "currentNumberScheduled": counts["current"],
        "numberMisscheduled": counts["misplaced"],
        "desiredNumberScheduled": counts["desired"],
        "numberReady": counts["ready"],
        "observedGeneration": daemon_set["metadata"].get("generation", 0),
    }
    more = {
        "updatedNumberScheduled": counts["updated"],
        "numberAvailable": counts["available"],
        "numberUnavailable": counts["desired"] - counts["available"],
    }
    return {**status, **{name: count for name, count in more.items() if count}}


def _node_matters(event: Event) -> bool:
    """Say whether a change of a node may change where daemon pods belong: a heartbeat does not."""
    if event.previous is None or event.type is EventType.DELETED:
        return True
    before, after = event.previous, event.object
    return labels_of(before) != labels_of(after) or node_taints(before) != node_taints(after)
