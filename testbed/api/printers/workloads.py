"""Tables of what makes pods, and of what limits and scales it."""

from __future__ import annotations

from typing import Any

from testbed.api.printers.cells import (
    AGE,
    CONTAINERS,
    IMAGES,
    NAME,
    NONE,
    SELECTOR,
    UNKNOWN,
    Column,
    Printer,
    age,
    columns,
    container_cells,
    duration,
    labels_text,
    name_of,
    seconds,
    selector_text,
    since,
    spec_of,
    status_of,
    template_cells,
)
from testbed.model.objects import Object

_WIDE = (CONTAINERS, IMAGES, SELECTOR)


def _deployment(obj: Object, now: float) -> list[Any]:
    spec, status = spec_of(obj), status_of(obj)
    return [
        name_of(obj), f"{status.get('readyReplicas', 0)}/{spec.get('replicas', 0)}", status.get("updatedReplicas", 0),
        status.get("availableReplicas", 0), age(obj, now), *template_cells(obj), selector_text(spec.get("selector")),
    ]  # fmt: skip


def _replica_set(obj: Object, now: float) -> list[Any]:
    spec, status = spec_of(obj), status_of(obj)
    selector = spec.get("selector")
    shown = labels_text(selector) if obj["kind"] == "ReplicationController" else selector_text(selector)
    return [
        name_of(obj), spec.get("replicas", 0), status.get("replicas", 0), status.get("readyReplicas", 0), age(obj, now),
        *template_cells(obj), shown,
    ]  # fmt: skip


def _daemon_set(obj: Object, now: float) -> list[Any]:
    spec, status = spec_of(obj), status_of(obj)
    fields = (
        "desiredNumberScheduled",
        "currentNumberScheduled",
        "numberReady",
        "updatedNumberScheduled",
        "numberAvailable",
    )
    pod_spec = (spec.get("template") or {}).get("spec") or {}
    return [
        name_of(obj), *(status.get(field, 0) for field in fields), labels_text(pod_spec.get("nodeSelector")), age(obj, now),
        *template_cells(obj), selector_text(spec.get("selector")),
    ]  # fmt: skip


def _stateful_set(obj: Object, now: float) -> list[Any]:
    ready = f"{status_of(obj).get('readyReplicas', 0)}/{spec_of(obj).get('replicas', 1)}"
    return [name_of(obj), ready, age(obj, now), *template_cells(obj)]


def _job(obj: Object, now: float) -> list[Any]:
    spec, status = spec_of(obj), status_of(obj)
    succeeded = status.get("succeeded", 0)
    if spec.get("completions") is not None:
        completions = f"{succeeded}/{spec['completions']}"
    elif spec.get("parallelism", 0) > 1:
        completions = f"{succeeded}/1 of {spec['parallelism']}"
    else:
        completions = f"{succeeded}/1"
    began = seconds(status.get("startTime", ""))
    ended = seconds(status.get("completionTime", ""))
    length = "" if began is None else duration((now if ended is None else ended) - began)
    return [
        name_of(obj), completions, length, age(obj, now), *template_cells(obj), selector_text(spec.get("selector")),
    ]  # fmt: skip


def _cron_job(obj: Object, now: float) -> list[Any]:
    spec, status = spec_of(obj), status_of(obj)
    last = status.get("lastScheduleTime")
    job_spec = (spec.get("jobTemplate") or {}).get("spec") or {}
    return [
        name_of(obj),
        spec.get("schedule", ""),
        spec.get("timeZone") or NONE,
        "True" if spec.get("suspend") else "False",
        len(status.get("active") or ()),
        since(last, now) if last else NONE,
        age(obj, now),
        *container_cells((job_spec.get("template") or {}).get("spec") or {}),
        selector_text(job_spec.get("selector")),
    ]


def _autoscaler(obj: Object, now: float) -> list[Any]:
    spec, status = spec_of(obj), status_of(obj)
    target = spec.get("scaleTargetRef") or {}
    current = {
        (one.get("resource") or {}).get("name"): ((one.get("resource") or {}).get("current") or {}).get("averageUtilization")
        for one in status.get("currentMetrics") or ()
    }  # fmt: skip
    metrics = []
    for metric in spec.get("metrics") or ():
        resource = metric.get("resource") or {}
        wanted = (resource.get("target") or {}).get("averageUtilization")
        have = current.get(resource.get("name"))
        seen = UNKNOWN if have is None else f"{have}%"
        metrics.append(f"{resource.get('name')}: {seen}/{'<auto>' if wanted is None else f'{wanted}%'}")
    return [
        name_of(obj), f"{target.get('kind', '')}/{target.get('name', '')}", ", ".join(metrics) or NONE,
        spec.get("minReplicas", "<unset>"), spec.get("maxReplicas", 0), status.get("currentReplicas", 0), age(obj, now),
    ]  # fmt: skip


def _budget(obj: Object, now: float) -> list[Any]:
    spec = spec_of(obj)
    shown = [str(spec[field]) if field in spec else "N/A" for field in ("minAvailable", "maxUnavailable")]
    return [name_of(obj), *shown, status_of(obj).get("disruptionsAllowed", 0), age(obj, now)]


def _revision(obj: Object, now: float) -> list[Any]:
    owner = next((one for one in obj["metadata"].get("ownerReferences") or () if one.get("controller")), None)
    shown = NONE
    if owner is not None:
        group = str(owner.get("apiVersion", "")).partition("/")[0] if "/" in str(owner.get("apiVersion", "")) else ""
        kind = str(owner.get("kind", "")).lower()
        shown = f"{kind}.{group}/{owner.get('name')}" if group else f"{kind}/{owner.get('name')}"
    return [name_of(obj), shown, obj.get("revision", 0), age(obj, now)]


_REPLICAS = Printer(columns(NAME, "#Desired", "#Current", "#Ready", AGE, *_WIDE), _replica_set)

PRINTERS: dict[str, Printer] = {
    "deployments.apps": Printer(
        columns(NAME, Column("Ready", description="Number of the pod with ready state"), "Up-to-date", "Available", AGE, *_WIDE),
        _deployment,
    ),
    "replicasets.apps": _REPLICAS,
    "replicationcontrollers": _REPLICAS,
    "daemonsets.apps": Printer(
        columns(
            NAME, "#Desired", "#Current", "#Ready", "#Up-to-date", "#Available", "Node Selector", AGE, *_WIDE
        ),
        _daemon_set,
    ),
    "statefulsets.apps": Printer(columns(NAME, "Ready", AGE, CONTAINERS, IMAGES), _stateful_set),
    "jobs.batch": Printer(
        columns(NAME, "Completions", Column("Duration", description="Time required to complete the job."), AGE, *_WIDE),
        _job,
    ),
    "cronjobs.batch": Printer(
        columns(NAME, "Schedule", "Timezone", "Suspend", "#Active", "Last Schedule", AGE, *_WIDE), _cron_job
    ),
    "horizontalpodautoscalers.autoscaling": Printer(
        columns(NAME, "Reference", "Targets", "MinPods", "MaxPods", "Replicas", AGE), _autoscaler
    ),
    "poddisruptionbudgets.policy": Printer(
        columns(NAME, "Min Available", "Max Unavailable", "#Allowed Disruptions", AGE), _budget
    ),
    "controllerrevisions.apps": Printer(columns(NAME, "Controller", "#Revision", AGE), _revision),
}  # fmt: skip
