"""CustomResourceDefinitions that are being deleted: their objects go first.

Source: apiextensions-apiserver pkg/controller/finalizer/crd_finalizer.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Iterable

from testbed.controllers.status import delete_if_there
from testbed.model.objects import DEFINITIONS, Key, is_terminating
from testbed.registry import Registry
from testbed.registry.definitions import CLEANUP_FINALIZER
from testbed.store import Event, EventType


class DefinitionFinalizer:
    """Deletes the objects of a definition that is going, and lets it go when none is left."""

    watches: frozenset[str] | None = None  # custom resources are not known beforehand

    def __init__(self) -> None:
        self._going: set[str] = set()

    def keys(self, event: Event) -> Iterable[Key]:
        """Return a definition that is going, when something happened to it or to its objects."""
        resource, _, name = event.key
        if resource == DEFINITIONS:
            if event.type is EventType.DELETED:
                self._going.discard(name)
            elif is_terminating(event.object):
                self._going.add(name)
                return [event.key]
        elif resource in self._going and event.type is EventType.DELETED:
            return [Key(DEFINITIONS, "", resource)]
        return ()

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Delete what there is of a resource; take the finalizer off once that is nothing."""
        definition = registry.store.get(*key)
        if definition is None or not is_terminating(definition):
            return None
        finalizers = definition["metadata"].get("finalizers") or []
        if CLEANUP_FINALIZER not in finalizers:
            return None
        if registry.resources.get(key.name) is not None:
            for obj in registry.store.list(key.name):
                if not is_terminating(obj):
                    metadata = obj["metadata"]
                    delete_if_there(registry, key.name, metadata.get("namespace", ""), metadata["name"])
        if registry.store.count(key.name):
            return None  # finalizers hold some; the event of the last one's removal brings us back
        remaining = [one for one in finalizers if one != CLEANUP_FINALIZER]
        registry.update(DEFINITIONS, {**definition, "metadata": {**definition["metadata"], "finalizers": remaining}})
        return None
