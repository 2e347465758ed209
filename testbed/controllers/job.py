"""Jobs: pods until enough have succeeded, too many failed, or the time is over.

Not here: indexed completion and pod failure policies.
Source: kubernetes pkg/controller/job/job_controller.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from testbed.controllers.events import record_event
from testbed.controllers.index import ClusterIndex
from testbed.controllers.pods import (
    condition_of,
    is_active,
    is_finished,
    is_ready,
    pod_from_template,
    seconds_since,
    with_condition,
)
from testbed.controllers.status import delete_if_there, write_status
from testbed.model.objects import Key, Object, is_terminating
from testbed.registry import Registry
from testbed.store import Event

_RESOURCE = "jobs.batch"
_COMPONENT = "job-controller"
_FIRST_BACKOFF_S = 10.0  # DefaultJobPodFailureBackOff
_MAX_BACKOFF_S = 600.0


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What a Job needs next. ``end`` is '' or the type of its last condition."""

    create: int = 0
    delete: int = 0
    end: str = ""
    why: str = "BackoffLimitExceeded"  # the reason of a failure


def plan_job(spec: Object, *, active: int, succeeded: int, failures: int) -> JobPlan:
    """Decide about a Job that has not ended.

    Args:
        failures: Failed pods, and restarts of containers in pods that are restarted in place.
    """
    completions, parallelism = spec.get("completions"), int(spec.get("parallelism", 1))
    if failures > int(spec.get("backoffLimit", 6)):
        return JobPlan(delete=active, end="Failed")
    # Without completions one success is enough, and the others may still finish.
    if succeeded >= completions if completions is not None else succeeded and not active:
        return JobPlan(delete=active, end="Complete")
    if spec.get("suspend"):
        return JobPlan(delete=active)
    wanted = parallelism if completions is None else min(parallelism, completions - succeeded)
    if completions is None and succeeded:
        wanted = min(wanted, active)
    return JobPlan(create=max(wanted - active, 0), delete=max(active - wanted, 0))


class JobController:
    """Makes the pods of Jobs and says when a Job has ended."""

    watches: frozenset[str] | None = frozenset({_RESOURCE, "pods"})

    def __init__(self, index: ClusterIndex) -> None:
        self._index = index

    def keys(self, event: Event) -> Iterable[Key]:
        """Return the Job itself, or the one that a pod belongs to."""
        if event.key.resource == _RESOURCE:
            return [event.key]
        references = event.object["metadata"].get("ownerReferences") or ()
        return [Key(_RESOURCE, event.key.namespace, ref["name"]) for ref in references if ref["kind"] == "Job"]

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Start or stop pods, then write down how far the Job is."""
        job = registry.store.get(*key)
        if job is None or is_terminating(job):
            return None
        if _has_ended(job):
            return _expire(job, key, registry)
        pods = self._index.owned("pods", job["metadata"]["uid"])
        active = [pod for pod in pods if is_active(pod)]
        failed = [pod for pod in pods if (pod.get("status") or {}).get("phase") == "Failed"]
        succeeded = [pod for pod in pods if (pod.get("status") or {}).get("phase") == "Succeeded"]
        plan = plan_job(
            job["spec"],
            active=len(active),
            succeeded=len(succeeded),
            failures=len(failed) + sum(_restarts(pod) for pod in active),
        )
        deadline_s = _deadline_left(job, registry.now())
        if deadline_s is not None and deadline_s <= 0 and not plan.end:
            plan = JobPlan(delete=len(active), end="Failed", why="DeadlineExceeded")
        wait = _backoff_left(failed, registry.now()) if plan.create else 0.0
        if not wait:
            for _ in range(plan.create):
                created = registry.create("pods", _job_pod(job))
                message = f"Created pod: {created['metadata']['name']}"
                record_event(registry, job, "Normal", "SuccessfulCreate", message, _COMPONENT)
        for pod in active[len(active) - plan.delete :]:
            name = pod["metadata"]["name"]
            delete_if_there(registry, "pods", key.namespace, name)
            record_event(registry, job, "Normal", "SuccessfulDelete", f"Deleted pod: {name}", _COMPONENT)
        pods = self._index.owned("pods", job["metadata"]["uid"])
        status = job_status(job, pods, len(succeeded), len(failed), plan, registry.now())
        _tell_suspension(registry, job, status)
        write_status(registry, key, status)
        if plan.end:
            _tell_end(registry, job, plan)
            return _time_to_live(job["spec"])
        if deadline_s is None and not job["spec"].get("suspend"):
            deadline_s = job["spec"].get("activeDeadlineSeconds")  # it has started now
        return min((one for one in (wait or None, deadline_s) if one is not None), default=None)


_FAILURES = {
    "BackoffLimitExceeded": "Job has reached the specified backoff limit",
    "DeadlineExceeded": "Job was active longer than specified deadline",
}


def job_status(job: Object, pods: Sequence[Object], succeeded: int, failed: int, plan: JobPlan, now: str) -> Object:
    """Return the status of a Job, with its last condition if it has ended."""
    before = job.get("status") or {}
    active = [pod for pod in pods if is_active(pod)]
    counts = {"active": len(active), "succeeded": succeeded, "failed": failed, "ready": sum(map(is_ready, active))}
    # Zero is told of what upstream keeps in pointers; the others are left out.
    status: Object = {name: count for name, count in counts.items() if count or name == "ready"}
    status["terminating"] = sum(is_terminating(pod) and not is_finished(pod) for pod in pods)
    status["uncountedTerminatedPods"] = {}  # pods are counted as soon as they end: none is ever waiting for it
    conditions: list[Object] = list(before.get("conditions") or [])
    is_suspended = bool(job["spec"].get("suspend"))
    known = condition_of(job, "Suspended")
    if is_suspended != ((known or {}).get("status") == "True"):
        reason = "JobSuspended" if is_suspended else "JobResumed"
        words = f"Job {'suspended' if is_suspended else 'resumed'}"
        new = {"type": "Suspended", "status": str(is_suspended), "reason": reason, "message": words}
        conditions = with_condition(conditions, {**new, "lastProbeTime": now, "lastTransitionTime": now})
    if not is_suspended:  # the time of a Job counts from when it was resumed
        resumed = known is not None and known.get("status") == "True"
        status["startTime"] = now if resumed else before.get("startTime", now)
    if plan.end:
        condition = {"type": plan.end, "status": "True", "lastProbeTime": now, "lastTransitionTime": now}
        if plan.end == "Failed":
            condition["reason"] = plan.why
            condition["message"] = _FAILURES[plan.why]
        else:
            status["completionTime"] = now
        conditions.append(condition)
    if conditions:
        status["conditions"] = conditions
    return status


def _tell_suspension(registry: Registry, job: Object, status: Object) -> None:
    before, now = condition_of(job, "Suspended"), condition_of({"status": status}, "Suspended")
    if now is not None and (before or {}).get("status") != now["status"]:
        reason = "Suspended" if now["status"] == "True" else "Resumed"
        record_event(registry, job, "Normal", reason, now["message"], _COMPONENT)


def _tell_end(registry: Registry, job: Object, plan: JobPlan) -> None:
    if plan.end == "Complete":
        record_event(registry, job, "Normal", "Completed", "Job completed", _COMPONENT)
    else:
        record_event(registry, job, "Warning", plan.why, _FAILURES[plan.why], _COMPONENT)


def _deadline_left(job: Object, now: str) -> float | None:
    """Return how much of activeDeadlineSeconds is left; None without one, or before the Job has started."""
    limit, started = job["spec"].get("activeDeadlineSeconds"), (job.get("status") or {}).get("startTime")
    if limit is None or started is None or job["spec"].get("suspend"):
        return None
    return float(limit) - seconds_since(started, now)


def _time_to_live(spec: Object) -> float | None:
    limit = spec.get("ttlSecondsAfterFinished")
    return None if limit is None else float(limit)


def _expire(job: Object, key: Key, registry: Registry) -> float | None:
    """Delete a Job that ended ttlSecondsAfterFinished ago, with its pods; else say when that will be."""
    limit = _time_to_live(job["spec"])
    ends = [
        one["lastTransitionTime"]
        for one in job["status"]["conditions"]
        if one["type"] in ("Complete", "Failed") and one["status"] == "True"
    ]
    if limit is None or not ends:
        return None
    left_s = limit - seconds_since(ends[0], registry.now())
    if left_s > 0:
        return left_s
    delete_if_there(registry, _RESOURCE, key.namespace, key.name, uid=job["metadata"]["uid"])
    return None


def _has_ended(job: Object) -> bool:
    return any((condition_of(job, kind) or {}).get("status") == "True" for kind in ("Complete", "Failed"))


def _job_pod(job: Object) -> Object:
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    labels = {"batch.kubernetes.io/job-name": name, "batch.kubernetes.io/controller-uid": uid}
    return pod_from_template(job["spec"]["template"], job, {**labels, "job-name": name, "controller-uid": uid})


def _restarts(pod: Object) -> int:
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return sum(int(one.get("restartCount", 0)) for one in statuses)


def _backoff_left(failed: Sequence[Object], now: str) -> float:
    """Return how long to wait after the last failure: 10 s, 20 s, 40 s, … at most 10 minutes."""
    if not failed:
        return 0.0
    pause = min(_FIRST_BACKOFF_S * 2.0 ** min(len(failed) - 1, 10), _MAX_BACKOFF_S)
    return max(pause - seconds_since(max(_ended_at(pod) for pod in failed), now), 0.0)


def _ended_at(pod: Object) -> str:
    ends = [
        one["state"]["terminated"]["finishedAt"]
        for one in (pod.get("status") or {}).get("containerStatuses") or ()
        if (one.get("state") or {}).get("terminated", {}).get("finishedAt")
    ]
    return str(max(ends, default=pod["metadata"]["creationTimestamp"]))
