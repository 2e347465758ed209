"""Watches: a bounded queue between the store, which never waits, and a connection, which may be slow."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from testbed.api.paths import Target
from testbed.api.selectors import Matcher
from testbed.api.statuses import status_of
from testbed.errors import ApiError
from testbed.model.objects import Object
from testbed.store import Event, EventType, Store

#: How many events a watcher may be behind before its connection is closed; it resumes or lists again.
MAX_WATCH_BACKLOG = 8192
#: The same in bytes: events of large ConfigMaps would be gigabytes before there are so many.
MAX_WATCH_BACKLOG_BYTES = 64 << 20
BOOKMARK_INTERVAL_S = 60.0
#: How soon we notice that a watcher has gone while nothing happens.
LIVENESS_INTERVAL_S = 5.0
_LINES_AT_ONCE = 256
_BYTES_AT_ONCE = 1 << 20  # a connection buffers what it is given, however much that is

_encode = msgspec.json.Encoder().encode

#: How an object is shown to a client, when not as it is stored: in another version, as a Table.
Render = Callable[[Object], Object]


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """What a watch asks for. ``since`` None: begin with the present state."""

    matches: Matcher | None
    since: int | None
    mark_end: bool
    bookmarks: bool
    timeout_s: float | None
    render: Render | None


class EventLines:
    """Watch lines of recent events, so that many watchers of one event cost one encoding."""

    def __init__(self, size: int = 1024) -> None:
        self._size = size
        self._lines: OrderedDict[tuple[int, EventType], bytes] = OrderedDict()

    def line(self, event: Event, kind: EventType) -> bytes:
        """Return the line for an event; ``kind`` differs from the event's own when a selector is entered or left."""
        key = (event.revision, kind)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = watch_line(kind.value, shown_object(event, kind))
            if len(self._lines) > self._size:
                self._lines.popitem(last=False)
        return line


def shown_object(event: Event, kind: EventType) -> Object:
    """Return the object that a watch event carries."""
    if kind is EventType.DELETED and event.type is EventType.MODIFIED and event.previous is not None:
        # Left the selector: the last state that matched, at the revision of the change (as upstream's cacher).
        previous = event.previous
        return {**previous, "metadata": {**previous["metadata"], "resourceVersion": str(event.revision)}}
    return event.object


def watch_line(kind: str, obj: Object) -> bytes:
    return _encode({"type": kind, "object": obj}) + b"\n"


class Watcher:
    """One open watch."""

    def __init__(
        self, request: web.Request, target: Target, options: WatchOptions, store: Store, lines: EventLines
    ) -> None:
        self._request = request
        self._target = target
        self._options = options
        self._store = store
        self._lines = lines
        self._queue: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._stopped = False
        self._subscription: Any = None
        self._queued_bytes = 0
        self._limit = MAX_WATCH_BACKLOG
        self._limit_bytes = MAX_WATCH_BACKLOG_BYTES

    def start(self) -> None:
        """Queue the current state, or what came after ``since``, and subscribe to what follows."""
        key, options = self._target.resource.key, self._options
        if options.since is None:
            for obj in self._store.list(key, self._target.namespace):
                if options.matches is None or options.matches(obj):
                    self._add(watch_line("ADDED", options.render(obj) if options.render else obj))
            if options.mark_end and options.bookmarks:
                self._add(self._bookmark({"k8s.io/initial-events-end": "true"}))
        self._limit = len(self._queue) + MAX_WATCH_BACKLOG
        self._limit_bytes = self._queued_bytes + MAX_WATCH_BACKLOG_BYTES
        try:
            self._subscription = self._store.subscribe(self._receive, key, options.since)
        except ApiError as error:
            # As upstream's cacher: the watch is opened, says why it cannot go on, and ends.
            self._add(watch_line("ERROR", status_of(error)))
            self._stopped = True

    def stop(self) -> None:
        """End the watch; what is queued is still sent."""
        self._stopped = True
        self._wake.set()
        if self._subscription is not None:
            self._subscription.cancel()

    def _bookmark(self, annotations: Mapping[str, str] | None = None) -> bytes:
        metadata: Object = {"resourceVersion": str(self._store.revision), "creationTimestamp": None}
        if annotations:
            metadata["annotations"] = dict(annotations)
        resource = self._target.resource
        obj: Object = {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata}
        return watch_line("BOOKMARK", self._options.render(obj) if self._options.render else obj)

    def _receive(self, event: Event) -> None:
        if self._target.namespace not in (None, event.key.namespace):
            return
        kind, options = event.type, self._options
        if options.matches is not None:
            before = event.previous is not None and options.matches(event.previous)
            now = event.type is not EventType.DELETED and options.matches(event.object)
            if not before and not now:
                return
            kind = EventType.MODIFIED if before and now else EventType.ADDED if now else EventType.DELETED
        if options.render is None:
            line = self._lines.line(event, kind)
        else:
            line = watch_line(kind.value, options.render(shown_object(event, kind)))
        self._add(line)
        self._wake.set()
        if len(self._queue) > self._limit or self._queued_bytes > self._limit_bytes:
            # The reader has stopped reading. Closing makes it resume from what it has, or list again.
            self.stop()
            self._queue.clear()
            if self._request.transport is not None:
                self._request.transport.abort()

    def _add(self, line: bytes) -> None:
        self._queue.append(line)
        self._queued_bytes += len(line)

    def _take(self) -> bytes:
        """Return what is sent next: at least one line."""
        lines: list[bytes] = []
        size = 0
        while self._queue and len(lines) < _LINES_AT_ONCE and size < _BYTES_AT_ONCE:
            line = self._queue.popleft()
            lines.append(line)
            size += len(line)
        self._queued_bytes -= size
        return b"".join(lines)

    async def run(self) -> web.StreamResponse:
        """Send what is queued until the time is over, the client goes, or the server stops."""
        response = web.StreamResponse(
            headers={"Content-Type": "application/json", "Cache-Control": "no-cache, private"}
        )
        response.enable_chunked_encoding()
        await response.prepare(self._request)
        loop = asyncio.get_running_loop()
        end = loop.time() + self._options.timeout_s if self._options.timeout_s is not None else float("inf")
        next_bookmark = loop.time() + BOOKMARK_INTERVAL_S
        try:
            while True:
                self._wake.clear()
                while self._queue:
                    await response.write(self._take())
                    # once the initial state, which may be longer, is nearly out
                    if len(self._queue) < MAX_WATCH_BACKLOG:
                        self._limit = MAX_WATCH_BACKLOG
                    if self._queued_bytes < MAX_WATCH_BACKLOG_BYTES:
                        self._limit_bytes = MAX_WATCH_BACKLOG_BYTES
                left = end - loop.time()
                if self._stopped or left <= 0:
                    break
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left, LIVENESS_INTERVAL_S)):
                        await self._wake.wait()
                if self._request.transport is None or self._request.transport.is_closing():
                    return response
                if self._options.bookmarks and loop.time() >= next_bookmark:
                    next_bookmark = loop.time() + BOOKMARK_INTERVAL_S
                    self._add(self._bookmark())
            await response.write_eof()
        except ConnectionError:
            pass  # the client has gone, which is how most watches end
        return response
