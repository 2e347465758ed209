"""The scale subresource: replicas as an autoscaling/v1 Scale object, the same for every kind that can be scaled."""

from __future__ import annotations

from testbed.errors import ApiError
from testbed.model.objects import Object


def scale_of(obj: Object) -> Object:
    """Return the Scale of a Deployment or ReplicaSet."""
    metadata, spec, status = obj["metadata"], obj.get("spec", {}), obj.get("status") or {}
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    labels = (spec.get("selector") or {}).get("matchLabels") or {}
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {field: metadata[field] for field in kept if field in metadata},
        "spec": {"replicas": spec.get("replicas", 1)},
        "status": {
            "replicas": status.get("replicas", 0),
            "selector": ",".join(f"{key}={value}" for key, value in sorted(labels.items())),
        },
    }


def with_scale(obj: Object, scale: Object) -> Object:
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
    return {**obj, "metadata": metadata, "spec": {**obj.get("spec", {}), "replicas": replicas}}
