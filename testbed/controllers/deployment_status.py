"""What a Deployment reports of its rollout. Pure.

Source: kubernetes pkg/controller/deployment/progress.go, sync.go, util/deployment_util.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Sequence

from testbed.controllers.pods import condition_of, seconds_since, with_condition
from testbed.controllers.rolling import rolling_bounds
from testbed.model.objects import Object

_NO_DEADLINE = 2**31 - 1


def deployment_status(deployment: Object, sets: Sequence[Object], new: Object | None, now: str) -> Object:
    """Return the status, with conditions that keep the times of what did not change.

    Args:
        sets: All ReplicaSets of the Deployment.
        new: The one with the present template.
    """
    spec, before = deployment["spec"], deployment.get("status") or {}
    counts = {
        "replicas": _sum(sets, "replicas"),
        "updatedReplicas": _sum([new] if new else [], "replicas"),
        "readyReplicas": _sum(sets, "readyReplicas"),
        "availableReplicas": _sum(sets, "availableReplicas"),
    }
    wanted_by_sets = sum(one["spec"].get("replicas", 1) for one in sets)
    counts["unavailableReplicas"] = max(wanted_by_sets - counts["availableReplicas"], 0)
    status: Object = {name: count for name, count in counts.items() if count}  # Kubernetes omits zeros
    status["observedGeneration"] = deployment["metadata"].get("generation", 0)
    conditions = list(before.get("conditions") or [])
    conditions = _set(conditions, _availability(deployment, counts["availableReplicas"]), now)
    status["conditions"] = conditions
    if spec.get("progressDeadlineSeconds", 600) != _NO_DEADLINE:
        status["conditions"] = _with_progress(deployment, status, new, now)
    return status


def is_complete(deployment: Object, status: Object) -> bool:
    """Say whether every replica is of the present version and available."""
    replicas = deployment["spec"].get("replicas", 1)
    return bool(
        status.get("updatedReplicas", 0) == replicas
        and status.get("replicas", 0) == replicas
        and status.get("availableReplicas", 0) == replicas
        and status["observedGeneration"] >= deployment["metadata"].get("generation", 0)
    )


def seconds_to_deadline(deployment: Object, status: Object, now: str) -> float | None:
    """Return when to look again whether the rollout is stuck, or None if there is nothing to wait for."""
    deadline = deployment["spec"].get("progressDeadlineSeconds", 600)
    progress = condition_of({"status": status}, "Progressing")
    if deadline == _NO_DEADLINE or progress is None or deployment["spec"].get("paused"):
        return None
    if progress["reason"] in ("NewReplicaSetAvailable", "ProgressDeadlineExceeded"):
        return None
    # A second more, because timestamps have no fractions.
    return max(float(deadline) - seconds_since(progress["lastUpdateTime"], now), 0.0) + 1.0


def _sum(sets: Sequence[Object], field: str) -> int:
    return sum((one.get("status") or {}).get(field, 0) for one in sets)


def _availability(deployment: Object, available: int) -> Object:
    rolling = (deployment["spec"].get("strategy") or {}).get("rollingUpdate") or {}
    replicas = deployment["spec"].get("replicas", 1)
    floor = replicas
    if (deployment["spec"].get("strategy") or {}).get("type") != "Recreate":
        floor = rolling_bounds(replicas, rolling.get("maxSurge", "25%"), rolling.get("maxUnavailable", "25%")).floor
    if available >= floor:
        return _condition("Available", "True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
    message = "Deployment does not have minimum availability."
    return _condition("Available", "False", "MinimumReplicasUnavailable", message)


def _with_progress(deployment: Object, status: Object, new: Object | None, now: str) -> list[Object]:
    conditions: list[Object] = status["conditions"]
    known = condition_of(deployment, "Progressing")
    of_what = f'ReplicaSet "{new["metadata"]["name"]}"' if new else f'Deployment "{deployment["metadata"]["name"]}"'
    if deployment["spec"].get("paused"):
        if known is not None and known["reason"] == "DeploymentPaused":
            return conditions
        return _set(conditions, _condition("Progressing", "Unknown", "DeploymentPaused", "Deployment is paused"), now)
    if (
        known is not None
        and known["reason"] == "NewReplicaSetAvailable"
        and status.get("replicas", 0) == status.get("updatedReplicas", 0)
    ):
        return conditions  # scaling a complete Deployment is no rollout
    if is_complete(deployment, status):
        message = f"{of_what} has successfully progressed."
        return _set(conditions, _condition("Progressing", "True", "NewReplicaSetAvailable", message), now)
    if (
        known is None
        or known["reason"] == "DeploymentPaused"
        or _has_progressed(deployment.get("status") or {}, status)
    ):
        going = _condition("Progressing", "True", "ReplicaSetUpdated", f"{of_what} is progressing.")
        return _set(conditions, going, now, always=True)
    late = seconds_since(known["lastUpdateTime"], now) > deployment["spec"].get("progressDeadlineSeconds", 600)
    if late and known["reason"] != "NewReplicaSetAvailable":
        stuck = _condition("Progressing", "False", "ProgressDeadlineExceeded", f"{of_what} has timed out progressing.")
        return _set(conditions, stuck, now)
    if known["reason"] == "NewReplicaSetAvailable":  # a new rollout begins
        going = _condition("Progressing", "True", "ReplicaSetUpdated", f"{of_what} is progressing.")
        return _set(conditions, going, now, always=True)
    return conditions


def _has_progressed(before: Object, after: Object) -> bool:
    def old(status: Object) -> int:
        return int(status.get("replicas", 0)) - int(status.get("updatedReplicas", 0))

    grew = any(
        after.get(name, 0) > before.get(name, 0) for name in ("updatedReplicas", "readyReplicas", "availableReplicas")
    )
    return grew or old(after) < old(before)


def _condition(kind: str, value: str, reason: str, message: str) -> Object:
    return {"type": kind, "status": value, "reason": reason, "message": message}


def _set(conditions: list[Object], new: Object, now: str, *, always: bool = False) -> list[Object]:
    """Put a condition in its place; the same status and reason again is no change, unless ``always``."""
    known = next((one for one in conditions if one["type"] == new["type"]), None)
    if known is None:
        return with_condition(conditions, {**new, "lastUpdateTime": now, "lastTransitionTime": now})
    if not always and (known["status"], known["reason"]) == (new["status"], new["reason"]):
        return conditions
    since = known["lastTransitionTime"] if known["status"] == new["status"] else now
    return with_condition(conditions, {**new, "lastUpdateTime": now, "lastTransitionTime": since})
