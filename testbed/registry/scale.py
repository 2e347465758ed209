"""The scale subresource: replicas as an autoscaling/v1 Scale object, the same for every kind that can be scaled."""

from __future__ import annotations

from typing import Any

from testbed.errors import ApiError
from testbed.model.objects import Object, Resource


def _at(obj: Object, path: str) -> Any:
    value: Any = obj
    for part in path.strip(".").split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _selector_text(obj: Object, path: str) -> str:
    if path:
        return str(_at(obj, path) or "")
    selector = (obj.get("spec") or {}).get("selector") or {}
    labels = selector.get("matchLabels", selector if "matchExpressions" not in selector else {}) or {}
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def scale_of(obj: Object, resource: Resource) -> Object:
    """Return the Scale of an object of a resource that can be scaled."""
    wanted, have, selector = resource.scale_paths
    metadata = obj["metadata"]
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    replicas = _at(obj, wanted)
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {field: metadata[field] for field in kept if field in metadata},
        "spec": {"replicas": (0 if resource.is_custom else 1) if replicas is None else replicas},
        "status": {"replicas": _at(obj, have) or 0, "selector": _selector_text(obj, selector)},
    }


def with_scale(obj: Object, scale: Object, resource: Resource) -> Object:
    """Return the object with the replicas that a Scale asks for.

    Raises:
        ApiError: 400 for what is not a Scale.
    """
    spec = scale.get("spec") or {}
    replicas = spec.get("replicas", 0) if isinstance(spec, dict) else None
    if type(replicas) is not int or not -(2**31) <= replicas < 2**31:
        shown = f"json: cannot unmarshal {type(replicas).__name__} into Go struct field ScaleSpec.spec.replicas of type int32"
        raise ApiError(400, "BadRequest", f'Scale in version "v1" cannot be handled as a Scale: {shown}')
    version = scale.get("metadata", {}).get("resourceVersion")
    metadata = {key: value for key, value in obj["metadata"].items() if key != "resourceVersion"}
    if version:
        metadata["resourceVersion"] = version
    scaled = _with(obj, resource.scale_paths[0].strip(".").split("."), replicas)
    return {**scaled, "metadata": metadata}


def _with(value: Any, path: list[str], new: Any) -> Object:
    inner = dict(value) if isinstance(value, dict) else {}
    inner[path[0]] = new if len(path) == 1 else _with(inner.get(path[0]), path[1:], new)
    return inner
