"""Objects in memory, with resource versions, list and watch.

::

    create/update/delete ──▶ objects[resource][namespace][name]
                         └─▶ history (ring of events) ──▶ subscribers, one event at a time, in order of revision

One counter serves the whole store, as in etcd: every change takes the next revision, so the history has no gaps and a
revision says at once where in the history it is. Stored objects are never changed in place and never copied: readers
share them, writers hand over a new dict.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from testbed.errors import ApiError
from testbed.model.objects import BY_KEY, Key, Object


class EventType(Enum):
    """What happened to an object; the values are the watch protocol's words."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"


@dataclass(frozen=True, slots=True)
class Event:
    """One change. ``object`` is the state after it, for DELETED the last state with the revision of the deletion."""

    type: EventType
    key: Key
    object: Object
    previous: Object | None
    revision: int


Callback = Callable[[Event], None]
Objects = list[Object]


def not_found(resource: str, name: str) -> ApiError:
    """Return the 404 of Kubernetes: ``services "web" not found``."""
    return ApiError(404, "NotFound", f'{resource} "{name}" not found', details=_details(resource, name))


def already_exists(resource: str, name: str) -> ApiError:
    """Return the 409 of Kubernetes for a name that is taken."""
    return ApiError(409, "AlreadyExists", f'{resource} "{name}" already exists', details=_details(resource, name))


def conflict(resource: str, name: str, reason: str = "") -> ApiError:
    """Return the 409 of Kubernetes for a write that was based on an older state."""
    why = reason or "the object has been modified; please apply your changes to the latest version and try again"
    message = f'Operation cannot be fulfilled on {resource} "{name}": {why}'
    return ApiError(409, "Conflict", message, details=_details(resource, name))


def expired(asked: int, oldest: int) -> ApiError:
    """Return the 410 that makes a watcher list again."""
    return ApiError(410, "Expired", f"too old resource version: {asked} ({oldest})")


def _details(resource: str, name: str) -> dict[str, str]:
    plural, _, group = resource.partition(".")
    details = {"name": name, "kind": plural}
    if resource in BY_KEY:
        details["kind"], group = BY_KEY[resource].plural, BY_KEY[resource].group
    return {**details, "group": group} if group else details


class Subscription:
    """A subscriber's place in the store; after ``cancel`` no event reaches it any more."""

    __slots__ = ("_after", "_callback", "_store", "cancelled", "resource")

    def __init__(self, store: Store, callback: Callback, resource: str | None, after: int) -> None:
        self._store = store
        self._callback = callback
        self._after = after
        self.resource = resource
        self.cancelled = False

    def cancel(self) -> None:
        """Stop receiving. Cancelling twice is harmless."""
        self.cancelled = True
        self._store._forget(self)

    def deliver(self, event: Event) -> None:
        """Pass on an event, unless it is one that the subscriber already knows or no longer wants."""
        if event.revision > self._after and not self.cancelled:
            self._after = event.revision
            self._callback(event)


class Store:
    """All objects of a cluster.

    Args:
        now: The time as RFC 3339 with seconds, ``2024-01-01T00:00:00Z``.
        new_uid: A new unique identifier at each call.
        history: How many changes a watcher may be behind before it must list again.
    """

    def __init__(self, *, now: Callable[[], str], new_uid: Callable[[], str], history: int = 4096) -> None:
        self._now = now
        self._new_uid = new_uid
        self._objects: dict[str, dict[str, dict[str, Object]]] = {}
        self._history: deque[Event] = deque(maxlen=history)
        self._subscriptions: dict[str | None, list[Subscription]] = {}
        self._undelivered: deque[tuple[Event, Sequence[Subscription] | None]] = deque()
        self._delivering = False
        self.revision = 0

    def get(self, resource: str, namespace: str, name: str) -> Object | None:
        """Return the stored object itself, or None."""
        return self._objects.get(resource, {}).get(namespace, {}).get(name)

    def list(self, resource: str, namespace: str | None = None) -> list[Object]:
        """Return the objects of one namespace, or of all, sorted by namespace and name."""
        spaces = self._objects.get(resource, {})
        chosen = sorted(spaces) if namespace is None else [namespace]
        found: list[Object] = []
        for space in chosen:
            objects = spaces.get(space, {})
            found.extend(objects[name] for name in sorted(objects))
        return found

    def list_at(self, resource: str, namespace: str | None, revision: int) -> Objects:
        """Return what `list` returned at an earlier revision: the present state, with later changes taken back.

        Raises:
            ApiError: 410 Expired when the history no longer reaches back, or the revision is in the future.
        """
        oldest = self.revision - len(self._history)
        if not oldest <= revision <= self.revision:
            raise expired(revision, oldest)
        if revision == self.revision:
            return self.list(resource, namespace)
        objects = {
            (obj["metadata"].get("namespace", ""), obj["metadata"]["name"]): obj
            for obj in self.list(resource, namespace)
        }
        for event in islice(reversed(self._history), self.revision - revision):
            if event.key.resource != resource or namespace not in (None, event.key.namespace):
                continue
            place = (event.key.namespace, event.key.name)
            if event.previous is None:
                objects.pop(place, None)
            else:
                objects[place] = event.previous
        return [objects[place] for place in sorted(objects)]

    def count(self, resource: str) -> int:
        """Return how many objects of a resource there are."""
        return sum(len(objects) for objects in self._objects.get(resource, {}).values())

    def create(self, resource: str, obj: Object) -> Object:
        """Store a new object and return it with uid (unless it has one), creationTimestamp and resourceVersion.

        Raises:
            ApiError: 409 AlreadyExists.
        """
        metadata = obj["metadata"]
        name, namespace = metadata["name"], metadata.get("namespace", "")
        objects = self._objects.setdefault(resource, {}).setdefault(namespace, {})
        if name in objects:
            raise already_exists(resource, name)
        stored = {
            **obj,
            "metadata": {
                **metadata,
                "uid": metadata.get("uid") or self._new_uid(),
                "creationTimestamp": self._now(),
                "resourceVersion": str(self.revision + 1),
            },
        }
        self.revision += 1
        objects[name] = stored
        self._publish(Event(EventType.ADDED, Key(resource, namespace, name), stored, None, self.revision))
        return stored

    def update(self, resource: str, obj: Object) -> Object:
        """Replace an object and return what is stored now. The same content again is no change and makes no event.

        Raises:
            ApiError: 404 NotFound; 409 Conflict when ``metadata.resourceVersion`` is given and stale.
        """
        metadata = obj["metadata"]
        name, namespace = metadata["name"], metadata.get("namespace", "")
        current = self.get(resource, namespace, name)
        if current is None:
            raise not_found(resource, name)
        was = current["metadata"]
        if metadata.get("resourceVersion") not in (None, "", was["resourceVersion"]):
            raise conflict(resource, name)
        kept = {
            "uid": was["uid"],
            "creationTimestamp": was["creationTimestamp"],
            "resourceVersion": was["resourceVersion"],
        }
        if {**obj, "metadata": {**metadata, **kept}} == current:
            return current
        self.revision += 1
        stored = {**obj, "metadata": {**metadata, **kept, "resourceVersion": str(self.revision)}}
        self._objects[resource][namespace][name] = stored
        self._publish(Event(EventType.MODIFIED, Key(resource, namespace, name), stored, current, self.revision))
        return stored

    def delete(self, resource: str, namespace: str, name: str) -> Object:
        """Remove an object at once and return its last state, with the revision of the removal.

        Raises:
            ApiError: 404 NotFound.
        """
        current = self.get(resource, namespace, name)
        if current is None:
            raise not_found(resource, name)
        spaces = self._objects[resource]
        del spaces[namespace][name]
        if not spaces[namespace]:
            del spaces[namespace]
        self.revision += 1
        last = {**current, "metadata": {**current["metadata"], "resourceVersion": str(self.revision)}}
        self._publish(Event(EventType.DELETED, Key(resource, namespace, name), last, current, self.revision))
        return last

    def subscribe(self, callback: Callback, resource: str | None = None, since: int | None = None) -> Subscription:
        """Call ``callback`` with every later change of a resource (None: of all), in order.

        With ``since`` the changes after that revision come first, before this returns (unless called by a subscriber).

        Raises:
            ApiError: 410 Expired when the history no longer reaches back to ``since``, or when ``since`` is in the
                future: such a number is from another store, and listing again is the only cure.
        """
        if since is None:
            since = self.revision
        oldest = self.revision - len(self._history)  # nothing after this revision is lost
        if not oldest <= since <= self.revision:
            raise expired(since, oldest)
        missed = [
            event for event in islice(self._history, since - oldest, None) if resource in (None, event.key.resource)
        ]
        # Subscribed after listing what was missed, so that an event that is still on its way to others comes once.
        subscription = Subscription(self, callback, resource, since)
        self._subscriptions.setdefault(resource, []).append(subscription)
        self._drain([(event, (subscription,)) for event in missed])
        return subscription

    def _forget(self, subscription: Subscription) -> None:
        remaining = [kept for kept in self._subscriptions.get(subscription.resource, ()) if kept is not subscription]
        self._subscriptions[subscription.resource] = remaining

    def _publish(self, event: Event) -> None:
        self._history.append(event)
        self._drain([(event, None)])

    def _drain(self, deliveries: Iterable[tuple[Event, Sequence[Subscription] | None]]) -> None:
        """Deliver events, to the given subscriptions or to all that want them, and all that come up meanwhile.

        A subscriber that writes makes its event wait until all have seen the present one, so everybody sees one order.
        A subscriber that fails costs the others nothing; its error reaches the writer afterwards.
        """
        self._undelivered.extend(deliveries)
        if self._delivering:
            return
        self._delivering = True
        error: Exception | None = None
        while self._undelivered:
            event, receivers = self._undelivered.popleft()
            if receivers is None:
                receivers = (*self._subscriptions.get(event.key.resource, ()), *self._subscriptions.get(None, ()))
            for subscription in receivers:
                try:
                    subscription.deliver(event)
                except Exception as failure:
                    error = error or failure
        self._delivering = False
        if error is not None:
            raise error
