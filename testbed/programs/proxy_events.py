"""Events that kube-proxy writes about its node and about Services, from a thread of its own: telling must delay no sync."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from testbed.errors import ApiError, TestbedError
from testbed.model.events import event_namespace, make_event
from testbed.model.objects import Object

_COMPONENT = "kube-proxy"


class EventApi(Protocol):
    """What is needed of `testbed.api.client.ApiClient`."""

    def get(self, resource: str, namespace: str, name: str) -> Object: ...

    def create(self, obj: Object) -> Object: ...

    def patch(self, resource: str, namespace: str, name: str, patch: Object) -> Object: ...


class Events:
    """Writes events one after the other; one that cannot be written is logged and lost."""

    def __init__(self, api: EventApi, node: str, log: Callable[[str], None]) -> None:
        self._api = api
        self._node = node
        self._log = log
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
        event = make_event(obj, kind, reason, message, _COMPONENT, now=now, host=self._node)
        place = ("events", event_namespace(obj), event["metadata"]["name"])
        try:
            try:
                self._api.create(event)
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
                count = int(self._api.get(*place).get("count", 1)) + 1
                patch: dict[str, Any] = {"count": count, "lastTimestamp": now}
                self._api.patch(*place, patch)
        except (TestbedError, OSError) as error:
            self._log(f"event {reason} about {obj.get('kind')} {obj['metadata']['name']} is lost: {error}")
