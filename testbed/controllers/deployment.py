"""Deployments: one ReplicaSet per version of the template, and the way from one to the next.

Source: kubernetes pkg/controller/deployment (v1.30).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from testbed.controllers.deployment_status import deployment_status, is_complete, seconds_to_deadline
from testbed.controllers.events import record_event
from testbed.controllers.index import ClusterIndex
from testbed.controllers.ownership import claim, possible_owners
from testbed.controllers.pods import controller_reference, is_finished
from testbed.controllers.rolling import Bounds, ReplicaCount, plan_rolling_update, plan_scaling, rolling_bounds
from testbed.controllers.status import delete_if_there, write_status
from testbed.controllers.template_hash import template_hash
from testbed.model.json_values import copy_value
from testbed.model.objects import Key, Object, is_terminating, labels_of, owner_uid
from testbed.registry import Registry
from testbed.store import Event, EventType

_RESOURCE = "deployments.apps"
_SETS = "replicasets.apps"
_COMPONENT = "deployment-controller"
HASH_LABEL = "pod-template-hash"
REVISION = "deployment.kubernetes.io/revision"
REVISION_HISTORY = "deployment.kubernetes.io/revision-history"
DESIRED_REPLICAS = "deployment.kubernetes.io/desired-replicas"
MAX_REPLICAS = "deployment.kubernetes.io/max-replicas"
# A Deployment's annotations are copied to its ReplicaSets, but for these.
_OWN_ANNOTATIONS = frozenset(
    {
        "kubectl.kubernetes.io/last-applied-configuration",
        REVISION,
        REVISION_HISTORY,
        DESIRED_REPLICAS,
        MAX_REPLICAS,
        "deprecated.deployment.rollback.to",
    }
)


class DeploymentController:
    """Creates, sizes and cleans up ReplicaSets, and reports on the rollout in the status."""

    watches: frozenset[str] | None = frozenset({_RESOURCE, _SETS, "pods"})

    def __init__(self, index: ClusterIndex) -> None:
        self._index = index

    def keys(self, event: Event) -> Iterable[Key]:
        """Return the Deployment itself, or those that own or might adopt a ReplicaSet that changed."""
        resource, namespace, _ = event.key
        if resource == _RESOURCE:
            return [event.key]
        if resource == "pods":
            return self._waiting_for_end_of(event)
        owners = self._index.in_namespace(_RESOURCE, namespace)
        sets = [event.object] if event.previous is None else [event.object, event.previous]
        return {
            Key(_RESOURCE, namespace, owner["metadata"]["name"])
            for replica_set in sets
            for owner in possible_owners(owners, replica_set)
        }

    def _waiting_for_end_of(self, event: Event) -> Iterable[Key]:
        """Return the Deployment of a pod that is gone, if it is one that replaces pods only when the old are gone."""
        if event.type is not EventType.DELETED:
            return ()
        for owner in self._index.in_namespace(_RESOURCE, event.key.namespace):
            if _strategy(owner)["type"] == "Recreate" and possible_owners([owner], _without_owner(event.object)):
                return [Key(_RESOURCE, event.key.namespace, owner["metadata"]["name"])]
        return ()

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Take one step of the rollout; the changes it makes bring the next."""
        deployment = registry.store.get(*key)
        if deployment is None:
            return None
        sets = sorted(claim(registry, self._index, deployment, _SETS), key=_age)
        if not is_terminating(deployment):
            self._step(registry, deployment, sets)
        sets = sorted(self._index.owned(_SETS, deployment["metadata"]["uid"]), key=_age)
        deployment = registry.store.get(*key) or deployment
        new = current_set(deployment, sets)
        status = deployment_status(deployment, sets, new, registry.now())
        if not is_terminating(deployment) and is_complete(deployment, status):
            for replica_set in sets_to_forget(deployment, sets, new):
                delete_if_there(registry, _SETS, key.namespace, replica_set["metadata"]["name"])
        write_status(registry, key, status)
        return seconds_to_deadline(deployment, status, registry.now())

    def _step(self, registry: Registry, deployment: Object, sets: list[Object]) -> None:
        if deployment["spec"].get("paused"):
            self._resize(registry, deployment, sets, _scaling_plan(deployment, sets, current_set(deployment, sets)))
            return
        new = current_set(deployment, sets)
        if _is_scaling(deployment, sets):
            self._resize(registry, deployment, sets, _scaling_plan(deployment, sets, new))
            return
        old = [replica_set for replica_set in sets if replica_set is not new]
        if _strategy(deployment)["type"] == "Recreate":
            running = [replica_set for replica_set in old if _wanted(replica_set)]
            if running:
                self._resize(registry, deployment, running, {_name(one): 0 for one in running})
                return
            if any(self._has_unfinished_pods(replica_set) for replica_set in old):
                return  # the end of the last one comes as an event
            new = self._ensure_current_set(registry, deployment, old, new)
            self._resize(registry, deployment, [new], {_name(new): _replicas(deployment)})
            return
        new = self._ensure_current_set(registry, deployment, old, new)
        plan = plan_rolling_update(_count(new), [_count(one) for one in old], _bounds(deployment))
        self._resize(registry, deployment, [*old, new], plan)

    def _has_unfinished_pods(self, replica_set: Object) -> bool:
        pods = self._index.owned("pods", replica_set["metadata"]["uid"])
        return any(not is_finished(pod) for pod in pods)

    def _ensure_current_set(
        self, registry: Registry, deployment: Object, old: Sequence[Object], new: Object | None
    ) -> Object:
        """Return the ReplicaSet of the present template, made if need be, with the newest revision."""
        revision = max((_revision(replica_set) for replica_set in old), default=0) + 1
        if new is None:
            wanted = plan_rolling_update(
                ReplicaCount(name="", wanted=0), [_count(one) for one in old], _bounds(deployment)
            )
            size = _replicas(deployment) if _strategy(deployment)["type"] == "Recreate" else wanted.get("", 0)
            new = registry.create(_SETS, new_replica_set(deployment, size, revision))
            message = f"Scaled up replica set {_name(new)} to {size}"
            record_event(registry, deployment, "Normal", "ScalingReplicaSet", message, _COMPONENT)
        else:
            new = _written(registry, _SETS, new, _annotations_of_set(deployment, new, max(revision, _revision(new))))
        shown = {**(deployment["metadata"].get("annotations") or {}), REVISION: str(_revision(new))}
        current = registry.get(_RESOURCE, deployment["metadata"]["namespace"], deployment["metadata"]["name"])
        _written(registry, _RESOURCE, current, shown)
        return new

    def _resize(self, registry: Registry, deployment: Object, sets: Sequence[Object], sizes: dict[str, int]) -> None:
        """Give ReplicaSets their sizes, and every active one the note what the Deployment wants now."""
        notes = _size_notes(deployment)
        for replica_set in sets:
            size, was = sizes.get(_name(replica_set), _wanted(replica_set)), _wanted(replica_set)
            annotations = replica_set["metadata"].get("annotations") or {}
            if size == was and (not was or annotations.items() >= notes.items()):
                continue
            current = registry.get(_SETS, replica_set["metadata"]["namespace"], _name(replica_set))
            metadata = {
                **current["metadata"],
                "annotations": {**(current["metadata"].get("annotations") or {}), **notes},
            }
            spec = {**current["spec"], "replicas": size}
            registry.update(_SETS, {**current, "metadata": metadata, "spec": spec})
            if size != was:
                message = (
                    f"Scaled {'up' if size > was else 'down'} replica set {_name(replica_set)} to {size} from {was}"
                )
                record_event(registry, deployment, "Normal", "ScalingReplicaSet", message, _COMPONENT)


# --- decisions -------------------------------------------------------------------------------------------------------


def new_replica_set(deployment: Object, replicas: int, revision: int) -> Object:
    """Return the ReplicaSet ``DEPLOYMENT-HASH`` for the present template."""
    metadata, spec = deployment["metadata"], deployment["spec"]
    template = copy_value(spec["template"])
    hash_label = {HASH_LABEL: template_hash(template)}
    template_labels = {**(template.get("metadata", {}).get("labels") or {}), **hash_label}
    template["metadata"] = {**template.get("metadata", {}), "labels": template_labels}
    selector = copy_value(spec["selector"])
    selector["matchLabels"] = {**(selector.get("matchLabels") or {}), **hash_label}
    set_spec: dict[str, Any] = {"replicas": replicas, "selector": selector, "template": template}
    if spec.get("minReadySeconds"):
        set_spec["minReadySeconds"] = spec["minReadySeconds"]
    replica_set: Object = {
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "metadata": {
            "name": f"{metadata['name']}-{hash_label[HASH_LABEL]}",
            "namespace": metadata["namespace"],
            "labels": template_labels,
            "ownerReferences": [controller_reference(deployment)],
        },
        "spec": set_spec,
    }
    replica_set["metadata"]["annotations"] = _annotations_of_set(deployment, replica_set, revision)
    return replica_set


def current_set(deployment: Object, sets: Sequence[Object]) -> Object | None:
    """Return the oldest ReplicaSet with the present template, or None."""
    wanted = _without_hash(deployment["spec"]["template"])
    return next((one for one in sets if _without_hash(one["spec"]["template"]) == wanted), None)


def sets_to_forget(deployment: Object, sets: Sequence[Object], new: Object | None) -> list[Object]:
    """Return the oldest empty ReplicaSets beyond spec.revisionHistoryLimit."""
    limit = deployment["spec"].get("revisionHistoryLimit", 10)
    idle = [
        one
        for one in sets
        if one is not new
        and not is_terminating(one)
        and not _wanted(one)
        and not (one.get("status") or {}).get("replicas")
        and one["metadata"].get("generation", 0) <= (one.get("status") or {}).get("observedGeneration", 0)
    ]
    return sorted(idle, key=_revision)[: max(len(idle) - limit, 0)]


def _is_scaling(deployment: Object, sets: Sequence[Object]) -> bool:
    """Say whether spec.replicas changed since the active ReplicaSets were sized."""
    noted = [(one["metadata"].get("annotations") or {}).get(DESIRED_REPLICAS) for one in sets if _wanted(one)]
    return any(note is not None and note != str(_replicas(deployment)) for note in noted)


def _scaling_plan(deployment: Object, sets: Sequence[Object], new: Object | None) -> dict[str, int]:
    active = [one for one in sets if _wanted(one)]
    latest = active[0] if len(active) == 1 else new if not active else None
    if latest is not None:
        return {_name(latest): _replicas(deployment)}
    if new is not None and _is_saturated(deployment, new):
        return {_name(one): 0 for one in active if one is not new}
    if _strategy(deployment)["type"] == "Recreate":
        return {}
    return plan_scaling([_count(one) for one in sorted(active, key=_wanted, reverse=True)], _bounds(deployment))


def _is_saturated(deployment: Object, new: Object) -> bool:
    replicas = _replicas(deployment)
    noted = (new["metadata"].get("annotations") or {}).get(DESIRED_REPLICAS)
    available = (new.get("status") or {}).get("availableReplicas", 0)
    return _wanted(new) == replicas == available and noted == str(replicas)


def _annotations_of_set(deployment: Object, replica_set: Object, revision: int) -> dict[str, str]:
    have = replica_set["metadata"].get("annotations") or {}
    copied = {
        name: value
        for name, value in (deployment["metadata"].get("annotations") or {}).items()
        if name not in _OWN_ANNOTATIONS
    }
    annotations = {**have, **copied, **_size_notes(deployment), REVISION: str(revision)}
    before = have.get(REVISION)
    if before and before != str(revision):  # an old version is the newest again: rolled back
        annotations[REVISION_HISTORY] = ",".join(filter(None, (have.get(REVISION_HISTORY), before)))
    return annotations


def _size_notes(deployment: Object) -> dict[str, str]:
    return {DESIRED_REPLICAS: str(_replicas(deployment)), MAX_REPLICAS: str(_bounds(deployment).ceiling)}


def _bounds(deployment: Object) -> Bounds:
    strategy = _strategy(deployment)
    if strategy["type"] == "Recreate":
        return Bounds(_replicas(deployment), 0, 0)
    rolling = strategy.get("rollingUpdate") or {}
    return rolling_bounds(_replicas(deployment), rolling.get("maxSurge", "25%"), rolling.get("maxUnavailable", "25%"))


def _strategy(deployment: Object) -> Object:
    return {"type": "RollingUpdate", **(deployment["spec"].get("strategy") or {})}


def _replicas(deployment: Object) -> int:
    return int(deployment["spec"].get("replicas", 1))


def _wanted(replica_set: Object) -> int:
    return int(replica_set["spec"].get("replicas", 1))


def _name(obj: Object) -> str:
    return str(obj["metadata"]["name"])


def _age(replica_set: Object) -> tuple[str, str]:
    return replica_set["metadata"]["creationTimestamp"], replica_set["metadata"]["name"]


def _revision(replica_set: Object) -> int:
    text = (replica_set["metadata"].get("annotations") or {}).get(REVISION, "")
    return int(text) if text.isdecimal() else 0


def _count(replica_set: Object) -> ReplicaCount:
    noted = (replica_set["metadata"].get("annotations") or {}).get(MAX_REPLICAS, "")
    return ReplicaCount(
        name=_name(replica_set),
        wanted=_wanted(replica_set),
        present=(replica_set.get("status") or {}).get("replicas", 0),
        available=(replica_set.get("status") or {}).get("availableReplicas", 0),
        max_replicas=int(noted) if noted.isdecimal() else 0,
    )


def _without_hash(template: Object) -> Object:
    labels = {label: value for label, value in labels_of({"metadata": {}, **template}).items() if label != HASH_LABEL}
    return {**template, "metadata": {**template.get("metadata", {}), "labels": labels}}


def _without_owner(pod: Object) -> Object:
    return {**pod, "metadata": {**pod["metadata"], "ownerReferences": []}} if owner_uid(pod) else pod


def _written(registry: Registry, resource: str, obj: Object, annotations: dict[str, str]) -> Object:
    if (obj["metadata"].get("annotations") or {}) == annotations:
        return obj
    return registry.update(resource, {**obj, "metadata": {**obj["metadata"], "annotations": annotations}})
