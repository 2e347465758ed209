"""Event objects (v1), as controllers, kubelets and kube-proxy write them: ``kubectl describe`` shows them."""

from __future__ import annotations

from hashlib import blake2b

from testbed.model.objects import Object

_MAX_NAME = 253 - 17  # of the object: a dot and sixteen characters follow


def event_name(obj: Object, kind: str, reason: str, message: str, component: str) -> str:
    """Return ``NAME.`` and sixteen hexadecimal digits, the same for the same event.

    Upstream puts the time there and finds repetitions in a cache; here the name itself finds them.
    """
    told = "\0".join((str(obj["metadata"].get("uid", "")), kind, reason, message, component))
    return f"{obj['metadata']['name'][:_MAX_NAME]}.{blake2b(told.encode(), digest_size=8).hexdigest()}"


def event_namespace(obj: Object) -> str:
    """Return where events about an object live: of Nodes and the like in ``default``, as upstream."""
    return obj["metadata"].get("namespace") or "default"


def make_event(
    obj: Object,
    kind: str,
    reason: str,
    message: str,
    component: str,
    *,
    now: str,
    host: str = "",
    field_path: str = "",
) -> Object:
    """Return a new Event about an object.

    Args:
        kind: ``Normal`` or ``Warning``.
        component: Who says it: ``deployment-controller``, ``kubelet``.
        now: RFC 3339.
        host: The node that the component works for.
        field_path: The part of the object: ``spec.containers{web}``.
    """
    metadata = obj["metadata"]
    involved = {
        "kind": obj.get("kind", ""),
        "apiVersion": obj.get("apiVersion", ""),
        "name": metadata["name"],
        "uid": metadata.get("uid", ""),
        "resourceVersion": metadata.get("resourceVersion", ""),
    }
    if metadata.get("namespace"):
        involved["namespace"] = metadata["namespace"]
    if field_path:
        involved["fieldPath"] = field_path
    name = event_name(obj, kind, reason, message + "\0" + field_path, component)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": event_namespace(obj)},
        "involvedObject": involved,
        "type": kind,
        "reason": reason,
        "message": message,
        "source": {"component": component, **({"host": host} if host else {})},
        "reportingComponent": component,
        "reportingInstance": host,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
