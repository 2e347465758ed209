"""Tables of pods, nodes, namespaces, configuration and events."""

from __future__ import annotations

from typing import Any

from testbed.api.printers.cells import (
    AGE,
    NAME,
    NONE,
    Column,
    Printer,
    age,
    columns,
    duration,
    labels_text,
    name_of,
    seconds,
    since,
    spec_of,
    status_of,
)
from testbed.model.objects import Object

_ROLE = "node-role.kubernetes.io/"


def _pod(pod: Object, now: float) -> list[Any]:
    spec, status = spec_of(pod), status_of(pod)
    ready, reason, restarts, last_restart = _containers(spec, status)
    if "deletionTimestamp" in pod["metadata"]:
        reason = "Unknown" if status.get("reason") == "NodeLost" else "Terminating"
    shown = str(restarts)
    if restarts and last_restart is not None:
        shown = f"{restarts} ({duration(now - last_restart)} ago)"
    gates = spec.get("readinessGates") or ()
    conditions = {one["type"]: one["status"] for one in status.get("conditions") or ()}
    passed = sum(conditions.get(gate.get("conditionType")) == "True" for gate in gates)
    addresses = status.get("podIPs") or [{"ip": status.get("podIP")}]
    return [
        name_of(pod),
        f"{ready}/{len(spec.get('containers') or ()) + _sidecars(spec)}",
        reason,
        shown,
        age(pod, now),
        addresses[0].get("ip") or NONE,
        spec.get("nodeName") or NONE,
        status.get("nominatedNodeName") or NONE,
        f"{passed}/{len(gates)}" if gates else NONE,
    ]


def _is_sidecar(container: Object) -> bool:
    return container.get("restartPolicy") == "Always"


def _sidecars(spec: Object) -> int:
    return sum(_is_sidecar(one) for one in spec.get("initContainers") or ())


def _containers(spec: Object, status: Object) -> tuple[int, str, int, float | None]:
    """Return how many are ready, what STATUS says, the restarts, and when the last one was."""
    reason = status.get("reason") or status.get("phase") or ""
    definitions = spec.get("initContainers") or ()
    sidecars = {one["name"] for one in definitions if _is_sidecar(one)}
    ready = restarts = side_restarts = 0
    last: float | None = None
    last_side: float | None = None
    for index, one in enumerate(status.get("initContainerStatuses") or ()):
        state = one.get("state") or {}
        ended, waiting = state.get("terminated"), state.get("waiting") or {}
        restarts += one.get("restartCount", 0)
        last = _later(last, one)
        if one.get("name") in sidecars:
            side_restarts += one.get("restartCount", 0)
            last_side = _later(last_side, one)
        if ended is not None and ended.get("exitCode") == 0:
            continue
        if one.get("name") in sidecars and one.get("started"):
            ready += bool(one.get("ready"))
            continue
        if ended is not None:
            inner = f"Init:{_end_reason(ended)}"
        elif waiting.get("reason") and waiting["reason"] != "PodInitializing":
            inner = f"Init:{waiting['reason']}"
        else:
            inner = f"Init:{index}/{len(definitions)}"
        return ready, inner, restarts, last
    restarts, last, running = side_restarts, last_side, False
    for one in reversed(status.get("containerStatuses") or ()):
        state = one.get("state") or {}
        ended, waiting = state.get("terminated"), state.get("waiting") or {}
        restarts += one.get("restartCount", 0)
        last = _later(last, one)
        if waiting.get("reason"):
            reason = waiting["reason"]
        elif ended is not None:
            reason = _end_reason(ended)
        elif one.get("ready") and "running" in state:
            running = True
            ready += 1
    if reason == "Completed" and running:
        conditions = {one["type"]: one["status"] for one in status.get("conditions") or ()}
        reason = "Running" if conditions.get("Ready") == "True" else "NotReady"
    return ready, reason, restarts, last


def _end_reason(ended: Object) -> str:
    if ended.get("reason"):
        return str(ended["reason"])
    return f"Signal:{ended['signal']}" if ended.get("signal") else f"ExitCode:{ended.get('exitCode', 0)}"


def _later(last: float | None, container: Object) -> float | None:
    ended = ((container.get("lastState") or {}).get("terminated") or {}).get("finishedAt")
    at = seconds(ended) if ended else None
    return at if last is None or (at is not None and at > last) else last


def _node(node: Object, now: float) -> list[Any]:
    labels, status = node["metadata"].get("labels") or {}, status_of(node)
    conditions = {one["type"]: one["status"] for one in status.get("conditions") or ()}
    words = ["Ready" if conditions["Ready"] == "True" else "NotReady"] if "Ready" in conditions else ["Unknown"]
    if spec_of(node).get("unschedulable"):
        words.append("SchedulingDisabled")
    roles = {key.removeprefix(_ROLE) for key in labels if key.startswith(_ROLE) and key != _ROLE}
    roles |= {value for key, value in labels.items() if key == "kubernetes.io/role" and value}
    addresses = {one["type"]: one["address"] for one in reversed(status.get("addresses") or ())}
    info = status.get("nodeInfo") or {}
    return [
        name_of(node),
        ",".join(words),
        ",".join(sorted(roles)) or NONE,
        age(node, now),
        info.get("kubeletVersion", ""),
        addresses.get("InternalIP", NONE),
        addresses.get("ExternalIP", NONE),
        *(info.get(field) or "<unknown>" for field in ("osImage", "kernelVersion", "containerRuntimeVersion")),
    ]


def _event(event: Object, now: float) -> list[Any]:
    series, count = event.get("series") or {}, event.get("count") or 0
    first = event.get("firstTimestamp") or event.get("eventTime")
    last = event.get("lastTimestamp") or event.get("eventTime")
    if series:
        last = series.get("lastObservedTime") or last
        count = series.get("count") or count
    about = event.get("involvedObject") or {}
    source = event.get("source") or {}
    component = source.get("component") or event.get("reportingComponent") or ""
    host = source.get("host") or ""
    kind = str(about.get("kind", "")).lower()
    return [
        since(last, now),
        event.get("type", ""),
        event.get("reason", ""),
        f"{kind}/{about.get('name', '')}" if about.get("name") else kind,
        about.get("fieldPath", ""),
        f"{component}, {host}" if host else component,
        str(event.get("message", "")).strip(),
        since(first, now),
        count or 1,
        name_of(event),
    ]


def _secret(secret: Object, now: float) -> list[Any]:
    return [name_of(secret), secret.get("type", ""), len(secret.get("data") or ()), age(secret, now)]


def _config_map(config: Object, now: float) -> list[Any]:
    return [name_of(config), len(config.get("data") or ()) + len(config.get("binaryData") or ()), age(config, now)]


def _volume(volume: Object, now: float) -> list[Any]:
    spec, status = spec_of(volume), status_of(volume)
    claim = spec.get("claimRef") or {}
    return [
        name_of(volume),
        (spec.get("capacity") or {}).get("storage", ""),
        _access_modes(spec),
        spec.get("persistentVolumeReclaimPolicy", ""),
        status.get("phase", ""),
        f"{claim.get('namespace', '')}/{claim.get('name', '')}" if claim else "",
        spec.get("storageClassName", ""),
        spec.get("volumeAttributesClassName") or "<unset>",
        status.get("reason", ""),
        age(volume, now),
        spec.get("volumeMode") or "<unset>",
    ]


def _claim(claim: Object, now: float) -> list[Any]:
    spec, status = spec_of(claim), status_of(claim)
    bound = bool(spec.get("volumeName"))
    return [
        name_of(claim),
        "Terminating" if "deletionTimestamp" in claim["metadata"] else status.get("phase", ""),
        spec.get("volumeName", ""),
        (status.get("capacity") or {}).get("storage", "") if bound else "",
        _access_modes(status) if bound else "",
        spec.get("storageClassName", ""),
        spec.get("volumeAttributesClassName") or "<unset>",
        age(claim, now),
        spec.get("volumeMode") or "<unset>",
    ]


def _access_modes(holder: Object) -> str:
    short = {"ReadWriteOnce": "RWO", "ReadOnlyMany": "ROX", "ReadWriteMany": "RWX", "ReadWriteOncePod": "RWOP"}
    modes = holder.get("accessModes") or ()
    return ",".join(text for mode, text in short.items() if mode in modes)


def _quota(quota: Object, now: float) -> list[Any]:
    status = status_of(quota)
    used = status.get("used") or {}
    requests: list[str] = []
    limits: list[str] = []
    for resource, hard in sorted((status.get("hard") or {}).items()):
        text = f"{resource}: {used.get(resource, '')}/{hard}"
        (limits if resource.startswith("limits.") else requests).append(text)
    return [name_of(quota), age(quota, now), ", ".join(requests), ", ".join(limits)]


def _pod_template(template: Object, now: float) -> list[Any]:
    inner = template.get("template") or {}
    containers = (inner.get("spec") or {}).get("containers") or ()
    names, images = (",".join(one.get(field, "") for one in containers) for field in ("name", "image"))
    return [name_of(template), names, images, labels_text((inner.get("metadata") or {}).get("labels"))]


PRINTERS: dict[str, Printer] = {
    "pods": Printer(
        columns(
            NAME,
            Column("Ready", description="The aggregate readiness state of this pod for accepting traffic."),
            Column("Status", description="The aggregate status of the containers in this pod."),
            Column("Restarts", description="How often the containers were restarted, and when the last one was."),
            AGE, "!IP", "!Node", "!Nominated Node", "!Readiness Gates",
        ),
        _pod,
    ),
    "nodes": Printer(
        columns(
            NAME, "Status", "Roles", AGE, "Version", "!Internal-IP", "!External-IP", "!OS-Image", "!Kernel-Version",
            "!Container-Runtime",
        ),
        _node,
    ),
    "namespaces": Printer(
        columns(NAME, "Status", AGE), lambda obj, now: [name_of(obj), status_of(obj).get("phase", ""), age(obj, now)]
    ),
    "events": Printer(
        columns(
            "Last Seen", "Type", "Reason", "Object", "!Subobject", "!Source", "Message", "!First Seen", "!#Count",
            Column("Name", format="name", priority=1),
        ),
        _event,
    ),
    "secrets": Printer(columns(NAME, "Type", "#Data", AGE), _secret),
    "configmaps": Printer(columns(NAME, "#Data", AGE), _config_map),
    "serviceaccounts": Printer(
        columns(NAME, "#Secrets", AGE), lambda obj, now: [name_of(obj), len(obj.get("secrets") or ()), age(obj, now)]
    ),
    "persistentvolumes": Printer(
        columns(
            NAME, "Capacity", "Access Modes", "Reclaim Policy", "Status", "Claim", "StorageClass",
            "VolumeAttributesClass", "Reason", AGE, "!VolumeMode",
        ),
        _volume,
    ),
    "persistentvolumeclaims": Printer(
        columns(
            NAME, "Status", "Volume", "Capacity", "Access Modes", "StorageClass", "VolumeAttributesClass", AGE,
            "!VolumeMode",
        ),
        _claim,
    ),
    "resourcequotas": Printer(columns(NAME, AGE, "Request", "Limit"), _quota),
    "podtemplates": Printer(columns(NAME, "Containers", "Images", "Pod Labels"), _pod_template),
}  # fmt: skip
