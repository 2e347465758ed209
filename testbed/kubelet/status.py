"""A pod's status from what its containers are doing. Pure. Sources: pkg/kubelet/status/generate.go, kubelet_pods.go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from testbed.model.objects import Object

State = Mapping[str, Any]
"""A ContainerState: ``{"waiting": {...}}``, ``{"running": {...}}`` or ``{"terminated": {...}}``."""

RUNTIME_NAME = "testbed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerView:
    """What a container is doing now."""

    name: str
    image: str
    container_id: str = ""
    state: State = field(default_factory=lambda: waiting("PodInitializing"))
    last_state: State = field(default_factory=dict)
    restart_count: int = 0
    is_ready: bool = False
    has_started: bool = False

    @property
    def terminated(self) -> Mapping[str, Any] | None:
        return self.state.get("terminated")

    @property
    def is_running(self) -> bool:
        return "running" in self.state


def waiting(reason: str, message: str = "") -> State:
    return {"waiting": {"reason": reason, **({"message": message} if message else {})}}


def running(started_at: str) -> State:
    return {"running": {"startedAt": started_at}}


def terminated(
    *, code: int, signal: int, reason: str, message: str, started_at: str, finished_at: str, container_id: str
) -> State:  # fmt: skip
    ended: dict[str, Any] = {
        "exitCode": code,
        "reason": reason,
        "startedAt": started_at,
        "finishedAt": finished_at,
        "containerID": f"{RUNTIME_NAME}://{container_id}",
    }
    if signal:
        ended["signal"] = signal
    if message:
        ended["message"] = message
    return {"terminated": ended}


def container_status(view: ContainerView) -> dict[str, Any]:
    return {
        "name": view.name,
        "image": view.image,
        "imageID": f"{RUNTIME_NAME}://image/{view.image}" if view.container_id else "",
        "containerID": f"{RUNTIME_NAME}://{view.container_id}" if view.container_id else "",
        "state": dict(view.state),
        "lastState": dict(view.last_state),
        "restartCount": view.restart_count,
        "ready": view.is_ready,
        "started": view.has_started,
    }


def phase_of(pod: Object, init: Sequence[ContainerView], main: Sequence[ContainerView]) -> str:
    """Return Pending, Running, Succeeded or Failed (generate.go, getPhase)."""
    policy = pod["spec"].get("restartPolicy", "Always")
    for view in init:
        if view.terminated and view.terminated["exitCode"] != 0 and policy == "Never":
            return "Failed"
    if any(not view.is_running and not view.terminated and not view.last_state for view in main):
        return "Pending"
    ends = [view.terminated for view in main]
    if policy != "Always" and all(ends):
        failed = any(end and end["exitCode"] != 0 for end in ends)
        if not failed:
            return "Succeeded"
        return "Failed" if policy == "Never" else "Running"
    return "Running"


def pod_status(
    pod: Object,
    *,
    init: Sequence[ContainerView],
    main: Sequence[ContainerView],
    has_sandbox: bool,
    pod_ip: str,
    host_ip: str,
    now: str,
    start_time: str,
) -> dict[str, Any]:
    """Return the whole status; conditions keep their transition time while their value stays.

    Args:
        init, main: views of spec.initContainers and spec.containers, in that order.
        has_sandbox: the pod's namespaces and network are there.
    """
    old = pod.get("status") or {}
    phase = phase_of(pod, init, main)
    status: dict[str, Any] = {
        **old,
        "phase": phase,
        "hostIP": host_ip,
        "hostIPs": [{"ip": host_ip}],
        "startTime": start_time,
        "containerStatuses": [container_status(view) for view in main],
    }
    if init:
        status["initContainerStatuses"] = [container_status(view) for view in init]
    if pod_ip:
        status["podIP"] = pod_ip
        status["podIPs"] = [{"ip": pod_ip}]
    status["conditions"] = _conditions(pod, phase, init, main, has_sandbox, now)
    return status


def _conditions(
    pod: Object, phase: str, init: Sequence[ContainerView], main: Sequence[ContainerView], has_sandbox: bool, now: str
) -> list[dict[str, Any]]:  # fmt: skip
    completed = phase in ("Succeeded", "Failed")
    sidecars = {
        container["name"]
        for container in pod["spec"].get("initContainers") or ()
        if container.get("restartPolicy") == "Always"
    }
    uninitialized = [view.name for view in init if not _is_done(view, is_sidecar=view.name in sidecars)]
    initialized = not uninitialized or phase == "Succeeded"
    unready = [view.name for view in main if not view.is_ready]
    if completed:
        ready, reason = False, "PodCompleted" if phase == "Succeeded" else "PodFailed"
        message = ""
    else:
        ready = not unready and initialized
        reason = "" if ready else "ContainersNotReady"
        message = "" if ready else f"containers with unready status: [{' '.join(unready)}]"
    wanted = [
        ("PodReadyToStartContainers", has_sandbox, "", ""),
        (
            "Initialized",
            initialized,
            "" if initialized else "ContainersNotInitialized",
            "" if initialized else f"containers with incomplete status: [{' '.join(uninitialized)}]",
        ),
        ("Ready", *_pod_ready(pod, ready, reason, message)),
        ("ContainersReady", ready, reason, message),
        ("PodScheduled", True, "", ""),
    ]
    known = {condition["type"]: condition for condition in (pod.get("status") or {}).get("conditions") or ()}
    conditions = [
        _condition(known.pop(type_, None), type_, is_true, why, words, now) for type_, is_true, why, words in wanted
    ]
    return conditions + list(known.values())


def _pod_ready(pod: Object, containers_ready: bool, reason: str, message: str) -> tuple[bool, str, str]:
    """Return whether a pod is ready: its containers are, and every readiness gate is open.

    Source: pkg/kubelet/status/generate.go, GeneratePodReadyCondition (v1.30).
    """
    if not containers_ready:
        return False, reason, message
    have = {one["type"]: one.get("status") for one in (pod.get("status") or {}).get("conditions") or ()}
    closed = []
    for gate in pod["spec"].get("readinessGates") or ():
        kind = gate["conditionType"]
        if kind not in have:
            closed.append(f'corresponding condition of pod readiness gate "{kind}" does not exist.')
        elif have[kind] != "True":
            closed.append(f'the status of pod readiness gate "{kind}" is not "True", but {have[kind]}')
    return (False, "ReadinessGatesNotReady", ", ".join(closed)) if closed else (True, "", "")


def _is_done(view: ContainerView, *, is_sidecar: bool) -> bool:
    """Say whether an init container no longer holds the pod back: it succeeded, or it is a sidecar that has started."""
    end = view.terminated
    return bool(end and end["exitCode"] == 0) or (is_sidecar and view.is_running and view.has_started)


def _condition(
    old: Mapping[str, Any] | None, type_: str, is_true: bool, reason: str, message: str, now: str
) -> dict[str, Any]:  # fmt: skip
    value = "True" if is_true else "False"
    since = old["lastTransitionTime"] if old and old.get("status") == value and "lastTransitionTime" in old else now
    condition: dict[str, Any] = {"type": type_, "status": value, "lastProbeTime": None, "lastTransitionTime": since}
    if reason:
        condition["reason"] = reason
    if message:
        condition["message"] = message
    return condition
