"""Facts about pods, and pods from templates. Pure.

Source: kubernetes pkg/api/v1/pod/util.go, pkg/controller/controller_utils.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from testbed.model.json_values import copy_value
from testbed.model.objects import Object, is_terminating


def condition_of(obj: Object, kind: str) -> Object | None:
    """Return the condition of a type from an object's status, or None."""
    for condition in (obj.get("status") or {}).get("conditions") or ():
        if condition.get("type") == kind:
            return dict(condition)
    return None


def with_condition(conditions: list[Object], new: Object) -> list[Object]:
    """Return the conditions with ``new`` in the place of the one of its type, or at the end."""
    if any(condition.get("type") == new["type"] for condition in conditions):
        return [new if condition.get("type") == new["type"] else condition for condition in conditions]
    return [*conditions, new]


def is_ready(pod: Object) -> bool:
    for condition in (pod.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "Ready":
            return bool(condition.get("status") == "True")
    return False


def is_finished(pod: Object) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def is_active(pod: Object) -> bool:
    """Say whether a controller counts a pod as one of its replicas."""
    return not is_finished(pod) and not is_terminating(pod)


def seconds_since(then: str, now: str) -> float:
    """Return the time from one RFC 3339 timestamp to another."""
    return (datetime.fromisoformat(now) - datetime.fromisoformat(then)).total_seconds()


def seconds_until_available(pod: Object, min_ready_s: int, now: str) -> float | None:
    """Return 0 for a pod that has been ready for ``min_ready_s``, how long it still takes, or None if it is not ready."""
    if not is_ready(pod):
        return None
    if not min_ready_s:
        return 0.0
    ready = condition_of(pod, "Ready") or {}
    since = ready.get("lastTransitionTime")
    return max(min_ready_s - seconds_since(since, now), 0.0) if since else float(min_ready_s)


def is_available(pod: Object, min_ready_s: int, now: Callable[[], str]) -> bool:
    if not min_ready_s:
        return is_ready(pod)
    return seconds_until_available(pod, min_ready_s, now()) == 0.0


def controller_reference(owner: Object) -> Object:
    """Return the ownerReferences entry that makes ``owner`` the controller of what carries it."""
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def pod_from_template(template: Object, owner: Object, labels: dict[str, str] | None = None) -> Object:
    """Return a pod ``OWNER-xxxxx`` that is controlled by ``owner``; ``labels`` are added to the template's."""
    metadata: dict[str, Any] = {
        "generateName": f"{owner['metadata']['name']}-",
        "namespace": owner["metadata"]["namespace"],
        "labels": {**(template.get("metadata", {}).get("labels") or {}), **(labels or {})},
        "ownerReferences": [controller_reference(owner)],
    }
    for field in ("annotations", "finalizers"):
        if template.get("metadata", {}).get(field):
            metadata[field] = copy_value(template["metadata"][field])
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": copy_value(template.get("spec", {}))}
