"""Writing what controllers decided, on top of whatever the object is by now."""

from __future__ import annotations

from testbed.errors import ApiError
from testbed.model.objects import Key, Object
from testbed.registry import Registry
from testbed.registry.registry import Propagation


def write_status(registry: Registry, key: Key, status: Object) -> None:
    """Make ``status`` the status of an object; one that is gone meanwhile needs none."""
    current = registry.store.get(*key)
    if current is not None and current.get("status") != status:
        registry.update(key.resource, {**current, "status": status}, subresource="status")


def delete_if_there(
    registry: Registry, resource: str, namespace: str, name: str, *, uid: str = "", propagation: Propagation = ""
) -> None:  # fmt: skip
    """Delete an object; succeeds when it, or the one of that uid, is gone already."""
    current = registry.store.get(resource, namespace, name)
    if current is None or (uid and current["metadata"]["uid"] != uid):
        return
    try:
        registry.delete(resource, namespace, name, propagation=propagation)
    except ApiError as error:
        if error.code != 404:
            raise
