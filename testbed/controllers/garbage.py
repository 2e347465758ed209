"""The garbage collector: what belongs to an object that is gone goes, too.

Foreground deletion and orphaning work by finalizers: the API sets ``foregroundDeletion`` or ``orphan`` on the owner,
this controller does what it says and takes the finalizer off.

Source: kubernetes pkg/controller/garbagecollector (v1.30).
"""

from __future__ import annotations

from collections.abc import Iterable

from testbed.controllers.index import ClusterIndex
from testbed.controllers.status import delete_if_there
from testbed.model.objects import Key, Object, is_terminating
from testbed.registry import Registry
from testbed.registry.registry import Propagation
from testbed.store import Event, EventType

FOREGROUND = "foregroundDeletion"
ORPHAN = "orphan"


class GarbageCollector:
    """Deletes objects whose owners are all gone."""

    watches: frozenset[str] | None = None

    def __init__(self, index: ClusterIndex) -> None:
        self._index = index
        self._awaited: dict[str, Key] = {}  # uid of an owner that waits for its dependents -> its key

    def keys(self, event: Event) -> Iterable[Key]:
        """Return the dependents of what is gone, objects whose owner is not there, and owners that wait."""
        metadata = event.object["metadata"]
        references = metadata.get("ownerReferences") or ()
        if event.type is EventType.DELETED:
            self._awaited.pop(metadata["uid"], None)
            waiting = [self._awaited[ref["uid"]] for ref in references if ref["uid"] in self._awaited]
            return [*self._index.dependents(metadata["uid"]), *waiting]
        if "deletionTimestamp" in metadata and _propagation(event.object):
            self._awaited[metadata["uid"]] = event.key
            return [event.key]
        if references and not all(self._index.exists(ref["uid"]) for ref in references):
            return [event.key]
        return ()

    def reconcile(self, key: Key, registry: Registry) -> float | None:
        """Delete an object without owners; carry out what the finalizer of a terminating owner asks for."""
        obj = registry.store.get(*key)
        if obj is None:
            return None
        if is_terminating(obj):
            self._propagate(registry, key, obj)
            return None
        references = obj["metadata"].get("ownerReferences") or []
        # The owner may be of a kind that we do not store: then nobody can say that it is gone.
        dangling = [ref for ref in references if self._is_gone(ref, registry)]
        if not dangling:
            return None
        if len(dangling) == len(references):
            delete_if_there(registry, key.resource, key.namespace, key.name, uid=obj["metadata"]["uid"])
            return None
        _write_references(registry, key, obj, [ref for ref in references if ref not in dangling])
        return None

    def _is_gone(self, reference: Object, registry: Registry) -> bool:
        known = registry.resources.of_kind(reference["apiVersion"], reference["kind"])
        return known is not None and not self._index.exists(reference["uid"])

    def _propagate(self, registry: Registry, key: Key, obj: Object) -> None:
        finalizer = _propagation(obj)
        if finalizer is None:
            return
        uid = obj["metadata"]["uid"]
        blocked = False
        for dependent_key in self._index.dependents(uid):
            dependent = registry.store.get(*dependent_key)
            if dependent is None:
                continue
            references = dependent["metadata"].get("ownerReferences") or []
            if finalizer == ORPHAN:
                _write_references(registry, dependent_key, dependent, [ref for ref in references if ref["uid"] != uid])
                continue
            others = [ref for ref in references if ref["uid"] != uid]
            if any(not self._is_gone(ref, registry) and ref["uid"] not in self._awaited for ref in others):
                _write_references(registry, dependent_key, dependent, others)  # somebody else keeps it
                continue
            if not is_terminating(dependent):
                # What has dependents itself goes foreground, too: its owner waits for all of them.
                policy: Propagation = "Foreground" if self._index.dependents(dependent["metadata"]["uid"]) else ""
                delete_if_there(registry, *dependent_key, propagation=policy)
            blocking = any(ref["uid"] == uid and ref.get("blockOwnerDeletion") for ref in references)
            blocked = blocked or (blocking and registry.store.get(*dependent_key) is not None)
        if blocked:
            return
        current = registry.store.get(*key)
        if current is not None:
            remaining = [one for one in current["metadata"].get("finalizers") or () if one != finalizer]
            registry.update(key.resource, {**current, "metadata": {**current["metadata"], "finalizers": remaining}})


def _propagation(obj: Object) -> str | None:
    finalizers = obj["metadata"].get("finalizers") or ()
    return next((one for one in (ORPHAN, FOREGROUND) if one in finalizers), None)


def _write_references(registry: Registry, key: Key, obj: Object, references: list[Object]) -> None:
    registry.update(key.resource, {**obj, "metadata": {**obj["metadata"], "ownerReferences": references}})
