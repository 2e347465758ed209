"""Events that programs on nodes write, from a thread of its own: telling must delay no sync and no answer."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from testbed.errors import ApiError, TestbedError
from testbed.model.events import event_namespace, make_event
from testbed.model.objects import Object

_CONFLICTS = 5


class EventApi(Protocol):
    """What is needed of `testbed.api.client.ApiClient`."""

    def get(self, resource: str, namespace: str, name: str) -> Object: ...

    def create(self, obj: Object) -> Object: ...

    def patch(self, resource: str, namespace: str, name: str, patch: Object) -> Object: ...


class Events:
    """Writes events one after the other; one that cannot be written is logged and lost."""

    def __init__(
        self, api: EventApi, node: str, log: Callable[[str], None], *, component: str = "kube-proxy"
    ) -> None:  # fmt: skip
        self._api = api
        self._node = node
        self._log = log
        self._component = component
        self._waiting: queue.SimpleQueue[tuple[Object, str, str, str]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="events", daemon=True).start()

    def tell(self, obj: Object, kind: str, reason: str, message: str) -> None:
        """Write an event of ``kind`` (Normal, Warning) about an object."""
        self._waiting.put((obj, kind, reason, message))

    def _run(self) -> None:
        while True:
            self.write(*self._waiting.get())

    def write(self, obj: Object, kind: str, reason: str, message: str) -> None:
        """Create the event, or count up the one that says the same."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        event = make_event(obj, kind, reason, message, self._component, now=now, host=self._node)
        place = ("events", event_namespace(obj), event["metadata"]["name"])
        try:
            try:
                self._api.create(event)
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
                self._count_up(place, now)
        except (TestbedError, OSError) as error:
            self._log(f"event {reason} about {obj.get('kind')} {obj['metadata']['name']} is lost: {error}")

    def _count_up(self, place: tuple[str, str, str], now: str) -> None:
        for tries_left in range(_CONFLICTS, -1, -1):
            known = self._api.get(*place)
            patch: dict[str, Any] = {
                "metadata": {"resourceVersion": known["metadata"]["resourceVersion"]},
                "count": int(known.get("count", 1)) + 1,
                "lastTimestamp": now,
            }
            try:
                self._api.patch(*place, patch)
                return
            except ApiError as error:  # another node's program has counted in between
                if error.code != 409 or not tries_left:
                    raise
