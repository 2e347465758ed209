"""The HTTP face of the registry: Kubernetes' REST paths, driven by the resource table.

::

    /api/v1/namespaces/NS/services/NAME/status       /apis/GROUP/VERSION/…       (`parse_path`)
       └─ discovery    └────── Target ──────┘

Nothing here knows a kind by name, but for the subresources that only one kind has. Every refusal leaves as a Status.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import msgspec
from aiohttp import web

from testbed.api.discovery import VERSION, api_group, api_groups, api_resources, core_versions, group_resources
from testbed.api.selectors import Matcher, parse_selectors
from testbed.errors import ApiError
from testbed.manifests import kinds
from testbed.model.objects import BY_KEY, Object, Resource
from testbed.registry import Registry
from testbed.registry.errors import bad_request, undecodable
from testbed.registry.scale import scale_of
from testbed.store import Event, EventType, conflict

#: Upstream's limit of a request body (3 MiB).
MAX_BODY_BYTES = 3 * 1024 * 1024
#: How many events a watcher may be behind before its connection is closed; it resumes or lists again.
MAX_WATCH_BACKLOG = 8192
BOOKMARK_INTERVAL_S = 60.0
#: How soon we notice that a watcher has gone while nothing happens.
LIVENESS_INTERVAL_S = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """What a URL names. ``namespace`` is None when none is given; ``name`` and ``subresource`` may be empty."""

    resource: Resource
    namespace: str | None
    name: str
    subresource: str

    @property
    def space(self) -> str:
        return self.namespace or ""


def parse_path(raw_path: str) -> Target | None:
    """Return what ``/api/v1/…`` or ``/apis/GROUP/VERSION/…`` names, or None.

    Segments are split before they are unquoted, so an encoded slash stays part of a name (and is refused as such).
    """
    segments = [unquote(segment) for segment in raw_path.strip("/").split("/")]
    if segments[:2] == ["api", "v1"]:
        group, version, rest = "", "v1", segments[2:]
    elif segments[0] == "apis" and len(segments) > 3:
        group, version, rest = segments[1], segments[2], segments[3:]
    else:
        return None
    namespace = None
    # /namespaces/NAME and /namespaces/NAME/status are a Namespace; /namespaces/NAME/OTHER is something in it.
    if len(rest) >= 3 and rest[0] == "namespaces" and not (group == "" and rest[2] in ("status", "finalize")):
        namespace, rest = rest[1], rest[2:]
    if not 1 <= len(rest) <= 3 or not all(rest):
        return None
    plural, name, subresource = (*rest, "", "")[:3]
    resource = BY_KEY.get(f"{plural}.{group}" if group else plural)
    if resource is None or resource.version != version or (namespace is not None and not resource.namespaced):
        return None
    if subresource and subresource not in resource.subresources:
        return None
    if name and resource.namespaced and namespace is None:
        return None
    return Target(resource, namespace, name, subresource)


def status_of(error: ApiError) -> Object:
    """Return the Status object for an error."""
    details: Object = dict(error.details)
    if error.causes:
        details["causes"] = [
            {"reason": cause.reason, "message": cause.message, "field": cause.field} for cause in error.causes
        ]
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": error.message,
        "reason": error.reason,
        **({"details": details} if details else {}),
        "code": error.code,
    }


def _json(value: Any, code: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=code, content_type="application/json", headers=headers)


def _unknown_path() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource")


def _not_allowed() -> ApiError:
    return ApiError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _errors_as_status(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return _json(status_of(error), error.code)
    except web.HTTPRequestEntityTooLarge:
        too_large = ApiError(413, "RequestEntityTooLarge", f"Request entity too large: limit is {MAX_BODY_BYTES}")
        return _json(status_of(too_large), 413)
    except web.HTTPNotFound:
        return _json(status_of(_unknown_path()), 404)
    except web.HTTPMethodNotAllowed:
        return _json(status_of(_not_allowed()), 405)
    except RecursionError:
        return _json(status_of(bad_request("the body of the request is nested too deeply")), 400)
    except ConnectionError:
        raise
    except Exception:
        _log.exception("request failed: %s %s", request.method, request.path_qs)
        return _json(status_of(ApiError(500, "InternalError", "Internal error occurred: see the lab's log")), 500)


def make_app(registry: Registry, *, ready: Callable[[], bool]) -> web.Application:
    """Return the application that serves a registry; ``ready`` decides what /readyz says."""
    api = _Api(registry, ready)
    app = web.Application(middlewares=[_errors_as_status], client_max_size=MAX_BODY_BYTES)
    app.router.add_get("/healthz", api.healthy)
    app.router.add_get("/livez", api.healthy)
    app.router.add_get("/readyz", api.ready)
    app.router.add_get("/version", api.version)
    app.router.add_route("*", "/api{tail:.*}", api.serve)
    app.on_shutdown.append(api.close)
    return app


class _Api:
    def __init__(self, registry: Registry, ready: Callable[[], bool]) -> None:
        self._registry = registry
        self._is_ready = ready
        self._watchers: set[_Watcher] = set()
        self._lines = _EventLines()

    async def close(self, app: web.Application) -> None:
        """End all watches, so that the server can go without waiting for them."""
        for watcher in tuple(self._watchers):
            watcher.stop()

    async def healthy(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def ready(self, request: web.Request) -> web.Response:
        return web.Response(text="ok") if self._is_ready() else web.Response(status=500, text="not ready")

    async def version(self, request: web.Request) -> web.Response:
        return _json(VERSION)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        raw_path = request.rel_url.raw_path
        target = parse_path(raw_path)
        if target is None:
            return self._discovery(request, raw_path)
        try:
            handler = self._handlers(target)[request.method]
        except KeyError:
            raise _not_allowed() from None
        return await handler(request, target)

    def _discovery(self, request: web.Request, raw_path: str) -> web.Response:
        answer: Object | None = None
        match raw_path.strip("/").split("/"):
            case ["api"]:
                answer = core_versions()
            case ["apis"]:
                answer = api_groups()
            case ["api", "v1"]:
                answer = api_resources()
            case ["apis", group]:
                answer = api_group(unquote(group))
            case ["apis", group, version]:
                answer = group_resources(unquote(group), unquote(version))
        if answer is None:
            raise _unknown_path()
        if request.method not in ("GET", "HEAD"):
            raise _not_allowed()
        return _json(answer)

    def _handlers(self, target: Target) -> dict[str, Callable[[web.Request, Target], Awaitable[web.StreamResponse]]]:
        if target.subresource == "binding":
            return {"POST": self._bind}
        if target.subresource in ("status", "scale"):
            return {"GET": self._get, "PUT": self._put, "PATCH": self._patch}
        if target.subresource == "finalize":
            return {"PUT": self._put}
        if target.subresource:
            return {}
        if target.name:
            return {"GET": self._get, "PUT": self._put, "PATCH": self._patch, "DELETE": self._delete}
        if target.resource.namespaced and target.namespace is None:
            return {"GET": self._list}
        collection: dict[str, Callable[[web.Request, Target], Awaitable[web.StreamResponse]]] = {
            "GET": self._list,
            "POST": self._create,
        }
        if target.resource.key != "namespaces":
            collection["DELETE"] = self._delete_collection
        return collection

    # --- one object --------------------------------------------------------------------------------------------------

    async def _get(self, request: web.Request, target: Target) -> web.Response:
        found = self._registry.get(target.resource.key, target.space, target.name)
        return _json(scale_of(found) if target.subresource == "scale" else found)

    async def _create(self, request: web.Request, target: Target) -> web.Response:
        obj = await _body(request)
        self._place(obj, target)
        warnings = _check_unknown_fields(request, target, obj)
        created = self._registry.create(target.resource.key, obj, dry_run=_dry_run(request))
        return _json(created, 201, warnings)

    async def _put(self, request: web.Request, target: Target) -> web.Response:
        obj = await _body(request)
        self._place(obj, target)
        metadata = obj["metadata"]
        if metadata.setdefault("name", target.name) != target.name:
            raise bad_request(
                f"the name of the object ({metadata['name']}) does not match the name on the URL ({target.name})"
            )
        warnings = _check_unknown_fields(request, target, obj) if target.subresource != "scale" else None
        updated = self._registry.update(
            target.resource.key, obj, subresource=target.subresource, dry_run=_dry_run(request)
        )
        return _json(scale_of(updated) if target.subresource == "scale" else updated, 200, warnings)

    async def _patch(self, request: web.Request, target: Target) -> web.Response:
        if request.content_type != "application/merge-patch+json":
            raise ApiError(
                415,
                "UnsupportedMediaType",
                "the body of the request was in an unknown format - accepted media types include: application/merge-patch+json",
            )
        patch = await _body(request, any_type=True)
        updated = self._registry.patch(
            target.resource.key,
            target.space,
            target.name,
            patch,
            subresource=target.subresource,
            dry_run=_dry_run(request),
        )
        return _json(scale_of(updated) if target.subresource == "scale" else updated)

    async def _delete(self, request: web.Request, target: Target) -> web.Response:
        options = await _delete_options(request)
        dry_run = _dry_run(request) or options.pop("dry_run")
        last = self._registry.delete(target.resource.key, target.space, target.name, dry_run=dry_run, **options)
        gone = self._registry.store.get(target.resource.key, target.space, target.name) is None
        if not gone or target.resource.key in ("pods", "services"):  # these answer with the object itself, as upstream
            return _json(last)
        details = {"name": target.name, "kind": target.resource.plural, "uid": last["metadata"]["uid"]}
        if target.resource.group:
            details["group"] = target.resource.group
        return _json({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details})

    async def _bind(self, request: web.Request, target: Target) -> web.Response:
        binding = await _body(request)
        node = binding["target"].get("name") if isinstance(binding.get("target"), dict) else None
        if not isinstance(node, str) or not node:
            raise bad_request("target.name: Required value")
        pod = self._registry.get("pods", target.space, target.name)
        if pod["spec"].get("nodeName"):
            why = f'pod {target.name} is already assigned to node "{pod["spec"]["nodeName"]}"'
            raise conflict("pods/binding", target.name, why)
        if not _dry_run(request):
            self._registry.patch("pods", target.space, target.name, {"spec": {"nodeName": node}})
        return _json({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}, 201)

    @staticmethod
    def _place(obj: Object, target: Target) -> None:
        """Put the namespace of the URL into the object, or refuse one that says otherwise."""
        metadata = obj.setdefault("metadata", {})
        if metadata is None:
            metadata = obj["metadata"] = {}
        if not isinstance(metadata, dict):
            raise bad_request("metadata is not a JSON object")
        if not target.resource.namespaced:
            metadata.pop("namespace", None)
        elif (metadata.get("namespace") or target.space) != target.space:
            raise bad_request("the namespace of the provided object does not match the namespace sent on the request")
        else:
            metadata["namespace"] = target.space

    # --- many objects ------------------------------------------------------------------------------------------------

    async def _list(self, request: web.Request, target: Target) -> web.StreamResponse:
        if _flag(request, "watch"):
            return await self._watch(request, target)
        matches = _matcher(request, target)
        found = self._registry.list(target.resource.key, target.namespace)
        return _json(self._as_list(target, found if matches is None else [obj for obj in found if matches(obj)]))

    def _as_list(self, target: Target, items: list[Object]) -> Object:
        return {
            "kind": f"{target.resource.kind}List",
            "apiVersion": target.resource.api_version,
            "metadata": {"resourceVersion": str(self._registry.store.revision)},
            "items": items,
        }

    async def _delete_collection(self, request: web.Request, target: Target) -> web.Response:
        options = await _delete_options(request)
        dry_run = _dry_run(request) or options.pop("dry_run")
        matches = _matcher(request, target)
        found = [
            obj for obj in self._registry.list(target.resource.key, target.namespace) if matches is None or matches(obj)
        ]
        deleted = []
        for obj in found:
            metadata = obj["metadata"]
            try:
                deleted.append(
                    self._registry.delete(
                        target.resource.key, metadata.get("namespace", ""), metadata["name"], dry_run=dry_run, **options
                    )
                )
            except ApiError as error:
                if error.code != 404:  # a subscriber of an earlier deletion may have taken it along
                    raise
        return _json(self._as_list(target, deleted))

    async def _watch(self, request: web.Request, target: Target) -> web.StreamResponse:
        matches = _matcher(request, target)
        since = request.query.get("resourceVersion", "")
        if since and not (since.isascii() and since.isdecimal() and len(since) < 19):
            raise bad_request(f'Invalid value: "{since}": strconv.ParseUint: parsing "{since}": invalid syntax')
        initial = _flag(request, "sendInitialEvents")
        timeout = request.query.get("timeoutSeconds", "")
        if timeout and not (timeout.isascii() and timeout.isdecimal() and len(timeout) < 10):
            raise bad_request(f"invalid timeoutSeconds {timeout!r}")
        watcher = _Watcher(request, target, matches, self._registry, self._lines)
        # From here to `run` nothing waits: the state that is sent and the events after it have no gap between them.
        watcher.start(int(since or 0), with_state=initial or since in ("", "0"), mark_end=initial)
        self._watchers.add(watcher)
        try:
            return await watcher.run(float(timeout) if timeout and int(timeout) else None)
        finally:
            self._watchers.discard(watcher)
            watcher.stop()


class _EventLines:
    """Watch lines of recent events, so that many watchers of one event cost one encoding."""

    def __init__(self, size: int = 1024) -> None:
        self._size = size
        self._lines: OrderedDict[tuple[int, str], bytes] = OrderedDict()

    def line(self, event: Event, kind: EventType) -> bytes:
        """Return the line for an event; ``kind`` differs from the event's own when a selector is entered or left."""
        key = (event.revision, kind.value)
        line = self._lines.get(key)
        if line is None:
            obj = event.object
            if kind is EventType.DELETED and event.type is EventType.MODIFIED and event.previous is not None:
                # Left the selector: the last state that matched, at the revision of the change (as upstream's cacher).
                previous = event.previous
                obj = {**previous, "metadata": {**previous["metadata"], "resourceVersion": str(event.revision)}}
            line = self._lines[key] = _watch_line(kind.value, obj)
            if len(self._lines) > self._size:
                self._lines.popitem(last=False)
        return line


def _watch_line(kind: str, obj: Object) -> bytes:
    return msgspec.json.encode({"type": kind, "object": obj}) + b"\n"


class _Watcher:
    """One open watch: a bounded queue between the store, which never waits, and a connection, which may be slow."""

    def __init__(
        self, request: web.Request, target: Target, matches: Matcher | None, registry: Registry, lines: _EventLines
    ) -> None:
        self._request = request
        self._target = target
        self._matches = matches
        self._registry = registry
        self._lines = lines
        self._bookmarks = _flag(request, "allowWatchBookmarks")
        self._queue: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._stopped = False
        self._subscription: Any = None

    def start(self, since: int, *, with_state: bool, mark_end: bool) -> None:
        """Queue the current state, or what came after ``since``, and subscribe to what follows."""
        key = self._target.resource.key
        store = self._registry.store
        if with_state:
            for obj in store.list(key, self._target.namespace):
                if self._matches is None or self._matches(obj):
                    self._queue.append(_watch_line("ADDED", obj))
            if mark_end and self._bookmarks:
                self._queue.append(self._bookmark({"k8s.io/initial-events-end": "true"}))
        self._limit = len(self._queue) + MAX_WATCH_BACKLOG
        self._subscription = store.subscribe(self._receive, key, None if with_state else since)

    def stop(self) -> None:
        """End the watch; what is queued is still sent."""
        self._stopped = True
        self._wake.set()
        if self._subscription is not None:
            self._subscription.cancel()

    def _bookmark(self, annotations: Mapping[str, str] | None = None) -> bytes:
        metadata: Object = {"resourceVersion": str(self._registry.store.revision), "creationTimestamp": None}
        if annotations:
            metadata["annotations"] = dict(annotations)
        resource = self._target.resource
        return _watch_line(
            "BOOKMARK", {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata}
        )

    def _receive(self, event: Event) -> None:
        if self._target.namespace not in (None, event.key.namespace):
            return
        kind = event.type
        if self._matches is not None:
            before = event.previous is not None and self._matches(event.previous)
            now = event.type is not EventType.DELETED and self._matches(event.object)
            if not before and not now:
                return
            kind = EventType.MODIFIED if before and now else EventType.ADDED if now else EventType.DELETED
        self._queue.append(self._lines.line(event, kind))
        self._wake.set()
        if len(self._queue) > self._limit:
            # The reader has stopped reading. Closing makes it resume from what it has, or list again.
            self.stop()
            self._queue.clear()
            if self._request.transport is not None:
                self._request.transport.abort()

    async def run(self, timeout_s: float | None) -> web.StreamResponse:
        """Send what is queued until the time is over, the client goes, or the server stops."""
        response = web.StreamResponse(
            headers={"Content-Type": "application/json", "Cache-Control": "no-cache, private"}
        )
        response.enable_chunked_encoding()
        await response.prepare(self._request)
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s if timeout_s is not None else float("inf")
        next_bookmark = loop.time() + BOOKMARK_INTERVAL_S
        try:
            while True:
                self._wake.clear()
                while self._queue:
                    await response.write(b"".join(self._queue.popleft() for _ in range(min(len(self._queue), 256))))
                    if len(self._queue) < MAX_WATCH_BACKLOG:
                        self._limit = MAX_WATCH_BACKLOG  # the initial state, which may be longer, is nearly out
                left = end - loop.time()
                if self._stopped or left <= 0:
                    break
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), min(left, LIVENESS_INTERVAL_S))
                if self._request.transport is None or self._request.transport.is_closing():
                    return response
                if self._bookmarks and loop.time() >= next_bookmark:
                    next_bookmark = loop.time() + BOOKMARK_INTERVAL_S
                    self._queue.append(self._bookmark())
            await response.write_eof()
        except ConnectionError:
            pass  # the client has gone, which is how most watches end
        return response


async def _body(request: web.Request, *, any_type: bool = False) -> Object:
    """Return the JSON object in the body; anything else is the client's mistake."""
    if not any_type and request.content_type not in ("application/json", "application/octet-stream", ""):
        raise ApiError(
            415,
            "UnsupportedMediaType",
            "the body of the request was in an unknown format - accepted media types include: application/json",
        )
    return _parse(await request.read())


def _parse(body: bytes) -> Object:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise bad_request(f"couldn't parse the body of the request as JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request(f"the body of the request is not a JSON object but {type(value).__name__}")
    return value


async def _delete_options(request: web.Request) -> dict[str, Any]:
    """Return the keyword arguments of `Registry.delete` that a DELETE's body and query ask for."""
    body = await request.read()
    given = _parse(body) if body.strip() else {}
    grace: Any = given.get("gracePeriodSeconds")
    if grace is None and "gracePeriodSeconds" in request.query:
        text = request.query["gracePeriodSeconds"]
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise bad_request(f"invalid gracePeriodSeconds {text!r}")
        grace = int(text)
    if grace is not None and (type(grace) is not int or not 0 <= grace < 2**31):
        raise bad_request(f"invalid gracePeriodSeconds {grace!r}")
    preconditions = given.get("preconditions") or {}
    if not isinstance(preconditions, dict):
        raise bad_request("preconditions is not a JSON object")
    dry_run = given.get("dryRun") or []
    if dry_run not in ([], ["All"]):
        raise _bad_dry_run(dry_run)
    return {
        "grace_s": grace,
        "uid": str(preconditions.get("uid") or ""),
        "resource_version": str(preconditions.get("resourceVersion") or ""),
        "dry_run": bool(dry_run),
    }


def _bad_dry_run(value: Any) -> ApiError:
    return bad_request(f'invalid dryRun {value!r}: supported values: "All"')


def _dry_run(request: web.Request) -> bool:
    values = request.query.getall("dryRun", [])
    if any(value != "All" for value in values):
        raise _bad_dry_run(values)
    return bool(values)


def _flag(request: web.Request, name: str) -> bool:
    # apimachinery's Convert_Slice_string_To_bool: a parameter that is there is true unless it says otherwise
    return name in request.query and request.query[name].lower() not in ("false", "0")


def _matcher(request: web.Request, target: Target) -> Matcher | None:
    label_selector, field_selector = request.query.get("labelSelector", ""), request.query.get("fieldSelector", "")
    return parse_selectors(label_selector, field_selector, target.resource.key)


def _check_unknown_fields(request: web.Request, target: Target, obj: Object) -> dict[str, str] | None:
    """Refuse unknown fields (``fieldValidation=Strict``) or return headers that warn of them (the default)."""
    mode = request.query.get("fieldValidation") or "Warn"
    if mode not in ("Ignore", "Warn", "Strict"):
        raise bad_request(f'invalid fieldValidation {mode!r}: supported values: "Ignore", "Warn", "Strict"')
    if mode == "Ignore":
        return None
    kind = target.resource
    unknown = [
        f'unknown field "{path}"'
        for path in kinds.unknown_fields({"apiVersion": kind.api_version, "kind": kind.kind, **obj})
    ]
    if unknown and mode == "Strict":
        raise undecodable(kind, f"strict decoding error: {', '.join(unknown)}")
    if not unknown:
        return None
    # A header carries ASCII without controls, in quotes (RFC 7234 section 5.5).
    text = ", ".join(unknown).encode("ascii", "backslashreplace").decode().replace("\\", "\\\\").replace('"', '\\"')
    text = "".join(char if char.isprintable() else "?" for char in text)
    return {"Warning": f'299 - "{text[:1000]}"'}
