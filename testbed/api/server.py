"""The HTTP face of the registry: Kubernetes' REST paths, driven by the resource table.

::

    request ─▶ errors_as_status ─▶ who asks (access) ─▶ parse_path ─▶ one handler per method
                                                        └─▶ discovery, OpenAPI, reviews

Nothing here knows a kind by name, but for the subresources that only one kind has. Every refusal leaves as a Status.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from testbed.api import discovery, openapi, reviews
from testbed.api.access import ADMIN, FindAccount, Tokens, User, authenticate, refuse_anonymous
from testbed.api.bodies import (
    delete_options,
    field_warnings,
    flag,
    is_dry_run,
    number,
    read_delete_options,
    read_object,
    warning_headers,
)
from testbed.api.lists import read_page, too_large
from testbed.api.patches import parse_patch
from testbed.api.paths import Target, parse_path, verb_of
from testbed.api.selectors import Matcher, parse_selectors
from testbed.api.statuses import (
    MAX_BODY_BYTES,
    Handler,
    errors_as_status,
    json_response,
    not_allowed,
    success,
    unknown_path,
)
from testbed.api.tables import AS_IT_IS, Shown, Tables, partial_metadata, wanted_form
from testbed.api.watching import EventLines, Watcher, WatchOptions
from testbed.errors import ApiError, Cause
from testbed.model.objects import Object, Resource
from testbed.registry import Registry
from testbed.registry.errors import bad_request
from testbed.registry.scale import scale_of
from testbed.store import conflict

__all__ = ["make_app"]

_MAX_TOKEN_SECONDS = 1 << 32


def make_app(
    registry: Registry,
    *,
    ready: Callable[[], bool],
    tokens: Tokens | None = None,
    now_s: Callable[[], float] = time.time,
) -> web.Application:
    """Return the application that serves a registry.

    Args:
        ready: decides what /readyz says.
        tokens: checks who asks over TLS; connections without TLS are the administrator's.
        now_s: seconds since 1970, for ages in tables.
    """
    api = _Api(registry, ready, tokens, now_s)
    app = web.Application(middlewares=[errors_as_status, api.access], client_max_size=MAX_BODY_BYTES)
    for path in ("/healthz", "/livez", "/readyz"):
        app.router.add_get(path + "{tail:(/.*)?}", api.ready if path == "/readyz" else api.healthy)
    app.router.add_get("/version{tail:/?}", api.version)
    app.router.add_get("/openapi/v2", api.openapi_v2)
    app.router.add_get("/openapi/v3{path:(/.*)?}", api.openapi_v3)
    app.router.add_get("/{tail:/?}", api.paths)
    app.router.add_route("*", "/api{tail:.*}", api.serve)
    app.on_shutdown.append(api.close)
    return app


class _Api:
    def __init__(
        self, registry: Registry, ready: Callable[[], bool], tokens: Tokens | None, now_s: Callable[[], float]
    ) -> None:
        self._registry = registry
        self._is_ready = ready
        self._tokens = tokens
        self._now_s = now_s
        self._tables = Tables(registry, now_s)
        self._watchers: set[Watcher] = set()
        self._lines = EventLines()
        self._find_account: FindAccount = lambda namespace, name: registry.store.get("serviceaccounts", namespace, name)

    async def close(self, app: web.Application) -> None:
        """End all watches, so that the server can go without waiting for them."""
        for watcher in tuple(self._watchers):
            watcher.stop()

    @property
    def access(self) -> Any:
        """The middleware that finds out who asks, and refuses those who may not."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            user = authenticate(request, self._tokens, self._find_account)
            if user is not ADMIN:
                target = parse_path(request.rel_url.raw_path, self._registry.resources)
                verb = verb_of(request.method, target, is_watch=flag(request, "watch"))
                refuse_anonymous(user, verb, target.described() if target else None, request.path)
            return await handler(request)

        return check

    # --- what every cluster answers ----------------------------------------------------------------------------------

    async def healthy(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def ready(self, request: web.Request) -> web.Response:
        return web.Response(text="ok") if self._is_ready() else web.Response(status=500, text="not ready")

    async def version(self, request: web.Request) -> web.Response:
        return json_response(discovery.VERSION)

    async def paths(self, request: web.Request) -> web.Response:
        groups = [f"/apis/{group['name']}" for group in discovery.api_groups(self._registry.resources)["groups"]]
        known = [
            "/api",
            "/api/v1",
            "/apis",
            *groups,
            "/healthz",
            "/livez",
            "/openapi/v2",
            "/openapi/v3",
            "/readyz",
            "/version",
        ]
        return json_response({"paths": sorted(known)})

    async def openapi_v2(self, request: web.Request) -> web.Response:
        accept = request.headers.get("Accept", "")
        if "protobuf" in accept:
            return web.Response(body=openapi.V2_PROTOBUF, headers={"Content-Type": openapi.V2_PROTOBUF_TYPE})
        info = {"title": "Kubernetes", "version": "v1.30.0"}
        return json_response({"swagger": "2.0", "info": info, "paths": {}, "definitions": {}})

    async def openapi_v3(self, request: web.Request) -> web.Response:
        path = request.match_info["path"].strip("/")
        if not path:
            return json_response(openapi.index(self._registry))
        parts = path.split("/")
        group_version = ("", parts[1]) if parts[0] == "api" and len(parts) == 2 else tuple(parts[1:])
        found = openapi.document(self._registry, *group_version) if len(group_version) == 2 else None
        if found is None:
            raise unknown_path()
        return json_response(found)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        raw_path = request.rel_url.raw_path
        target = parse_path(raw_path, self._registry.resources)
        if target is not None:
            handler = self._handlers(target).get("GET" if request.method == "HEAD" else request.method)
            if handler is None:
                raise not_allowed()
            return await handler(request, target)
        kind = reviews.review_kind(raw_path)
        if kind is None:
            return self._discovery(request, raw_path)
        if request.method != "POST":
            raise not_allowed()
        review, _ = await read_object(request)
        user = authenticate(request, self._tokens, self._find_account)
        return json_response(reviews.answer(kind, review, user, self._token_owner(review)), 201)

    def _token_owner(self, review: Object) -> dict[str, User]:
        spec = review.get("spec")
        token = spec.get("token") if isinstance(spec, dict) else None
        if self._tokens is None or not isinstance(token, str):
            return {}
        owner = self._tokens.user_of(token, self._find_account)
        return {token: owner} if owner else {}

    def _discovery(self, request: web.Request, raw_path: str) -> web.Response:
        answer: Object | None = None
        table = self._registry.resources
        segments = [unquote(segment) for segment in raw_path.strip("/").split("/")]
        if segments in (["api"], ["apis"]):
            asked = discovery.aggregated_version(request.headers.get("Accept", ""))
            if asked is not None and request.method == "GET":
                group, _, version = asked.partition("/")
                content_type = f"application/json;g={group};v={version};as=APIGroupDiscoveryList"
                found = discovery.aggregated(table, segments[0], asked)
                return json_response(found, headers={"Vary": "Accept"}, content_type=content_type)
        match segments:
            case ["api"]:
                answer = discovery.core_versions()
            case ["apis"]:
                answer = discovery.api_groups(table)
            case ["api", "v1"]:
                answer = discovery.group_resources(table, "", "v1")
            case ["apis", group]:
                answer = discovery.api_group(table, group)
            case ["apis", group, version] if group:
                answer = discovery.group_resources(table, group, version)
        if answer is None:
            raise unknown_path()
        if request.method not in ("GET", "HEAD"):
            raise not_allowed()
        return json_response(answer)

    def _handlers(self, target: Target) -> Mapping[str, Callable[[web.Request, Target], Awaitable[web.StreamResponse]]]:
        match target.subresource:
            case "binding":
                return {"POST": self._bind}
            case "eviction":
                return {"POST": self._evict}
            case "token":
                return {"POST": self._request_token}
            case "status" | "scale":
                return {"GET": self._get, "PUT": self._put, "PATCH": self._patch}
            case "finalize":
                return {"PUT": self._put}
            case "":
                pass
            case _:
                return {}
        if target.name:
            return {"GET": self._get, "PUT": self._put, "PATCH": self._patch, "DELETE": self._delete}
        if target.resource.namespaced and target.namespace is None:
            return {"GET": self._list}
        collection = {"GET": self._list, "POST": self._create}
        if target.resource.key != "namespaces":
            collection["DELETE"] = self._delete_collection
        return collection

    # --- one object --------------------------------------------------------------------------------------------------

    def _answer(
        self, target: Target, obj: Object, shown: Shown, code: int = 200, warnings: Mapping[str, str] | None = None
    ) -> web.Response:
        """Return one object in the form that the client wants."""
        warnings = warnings or self._deprecation(target.resource)
        if target.subresource == "scale":
            return json_response(scale_of(obj, target.resource), code, warnings)
        obj = _in_version(obj, target.resource)
        if shown.form == "table":
            metadata = {"resourceVersion": obj["metadata"].get("resourceVersion", "")}
            obj = self._tables.table(target.resource, [obj], shown, metadata)
        elif shown.form == "metadata":
            obj = partial_metadata(obj, shown.version)
        return json_response(obj, code, warnings)

    def _deprecation(self, resource: Resource) -> Mapping[str, str] | None:
        if not resource.is_custom:
            return None
        defined = self._registry.customs.version(resource)
        return warning_headers([defined.deprecation]) if defined and defined.deprecation else None

    async def _get(self, request: web.Request, target: Target) -> web.Response:
        shown = wanted_form(request)
        return self._answer(target, self._registry.get(target.resource.key, target.space, target.name), shown)

    async def _create(self, request: web.Request, target: Target) -> web.Response:
        shown = wanted_form(request)
        obj, twice = await read_object(request)
        self._place(obj, target)
        warnings = field_warnings(request, target.resource, self._registry, obj, twice)
        obj.setdefault("apiVersion", target.resource.api_version)
        created = self._registry.create(target.resource.key, obj, dry_run=is_dry_run(request))
        return self._answer(target, created, shown, 201, warnings)

    async def _put(self, request: web.Request, target: Target) -> web.Response:
        shown = wanted_form(request)
        obj, twice = await read_object(request)
        self._place(obj, target)
        metadata = obj["metadata"]
        if metadata.setdefault("name", target.name) != target.name:
            raise bad_request(
                f"the name of the object ({metadata['name']}) does not match the name on the URL ({target.name})"
            )
        warnings = None
        if target.subresource != "scale":
            warnings = field_warnings(request, target.resource, self._registry, obj, twice)
            obj.setdefault("apiVersion", target.resource.api_version)
        updated = self._registry.update(
            target.resource.key, obj, subresource=target.subresource, dry_run=is_dry_run(request)
        )
        return self._answer(target, updated, shown, 200, warnings)

    async def _patch(self, request: web.Request, target: Target) -> web.Response:
        shown = wanted_form(request)
        dry_run = is_dry_run(request)
        change = parse_patch(request.content_type, await request.read(), target.resource, target.subresource)
        warnings: dict[str, str] | None = None

        def changed(current: Object) -> Object:
            nonlocal warnings
            new = change(_in_version(current, target.resource) if target.subresource != "scale" else current)
            if target.subresource != "scale":
                warnings = field_warnings(request, target.resource, self._registry, new, [])
            return new

        updated = self._registry.modify(
            target.resource.key, target.space, target.name, changed, subresource=target.subresource, dry_run=dry_run
        )
        return self._answer(target, updated, shown, 200, warnings)

    async def _delete(self, request: web.Request, target: Target) -> web.Response:
        shown = wanted_form(request)
        options = await read_delete_options(request)
        key, space, name = target.resource.key, target.space, target.name
        last = self._registry.delete(
            key, space, name, grace_s=options.grace_s, uid=options.uid, resource_version=options.resource_version,
            propagation=options.propagation, dry_run=options.dry_run,
        )  # fmt: skip
        gone = self._registry.store.get(key, space, name) is None
        if not gone or key in ("pods", "services"):  # these answer with the object itself, as upstream
            return self._answer(target, last, shown)
        details = {"name": name, "kind": target.resource.plural, "uid": last["metadata"]["uid"]}
        if target.resource.group:
            details["group"] = target.resource.group
        return success(200, details=details)

    async def _bind(self, request: web.Request, target: Target) -> web.Response:
        binding, _ = await read_object(request)
        node = binding["target"].get("name") if isinstance(binding.get("target"), dict) else None
        if not isinstance(node, str) or not node:
            raise bad_request("target.name: Required value")
        pod = self._registry.get("pods", target.space, target.name)
        if pod["spec"].get("nodeName"):
            why = f'pod {target.name} is already assigned to node "{pod["spec"]["nodeName"]}"'
            raise conflict("pods/binding", target.name, why)
        self._registry.patch(
            "pods", target.space, target.name, {"spec": {"nodeName": node}}, dry_run=is_dry_run(request)
        )
        return success(201)

    async def _evict(self, request: web.Request, target: Target) -> web.Response:
        """Delete a pod as ``kubectl drain`` does. PodDisruptionBudgets are stored and hold nobody back."""
        eviction, _ = await read_object(request)
        if eviction.get("kind", "Eviction") != "Eviction":
            raise bad_request(f"{eviction['kind']} cannot be handled as an Eviction")
        given = eviction.get("deleteOptions") or {}
        if not isinstance(given, dict):
            raise bad_request("deleteOptions is not a JSON object")
        options = delete_options(request, given)
        self._registry.delete(
            "pods", target.space, target.name, grace_s=options.grace_s, uid=options.uid,
            resource_version=options.resource_version, propagation=options.propagation, dry_run=options.dry_run,
        )  # fmt: skip
        return success(201)

    async def _request_token(self, request: web.Request, target: Target) -> web.Response:
        """Answer a TokenRequest, which is what ``kubectl create token`` sends."""
        asked, _ = await read_object(request)
        account = self._registry.get(target.resource.key, target.space, target.name)
        if self._tokens is None:
            raise ApiError(501, "NotImplemented", "this server issues no tokens")
        spec = asked.get("spec") or {}
        wanted = spec.get("expirationSeconds", 3600) if isinstance(spec, dict) else None
        if type(wanted) is not int or not 600 <= wanted <= _MAX_TOKEN_SECONDS:
            detail = "may not specify a duration less than 10 minutes"
            cause = Cause("spec.expirationSeconds", f"Invalid value: {wanted}: {detail}")
            text = f'TokenRequest.authentication.k8s.io "" is invalid: {cause}'
            raise ApiError(422, "Invalid", text, causes=[cause])
        token = self._tokens.issue(account, seconds=wanted)
        expires = datetime.fromtimestamp(self._now_s() + wanted, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        metadata = {"name": target.name, "namespace": target.space, "creationTimestamp": self._registry.now()}
        answer = {
            "kind": "TokenRequest",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": metadata,
            "spec": spec,
            "status": {"token": token, "expirationTimestamp": expires},
        }
        return json_response(answer, 201)

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
        if flag(request, "watch"):
            return await self._watch(request, target)
        shown = wanted_form(request)
        page = read_page(request, target, self._registry.store, _matcher(request, target))
        warnings = self._deprecation(target.resource)
        return json_response(self._as_list(target, page.items, shown, page.metadata), headers=warnings)

    def _as_list(self, target: Target, items: list[Object], shown: Shown, metadata: Object) -> Object:
        resource = target.resource
        if resource.is_custom:
            items = [_in_version(obj, resource) for obj in items]
        if shown.form == "table":
            return self._tables.table(resource, items, shown, metadata)
        if shown.form == "metadata":
            kind, version = "PartialObjectMetadataList", f"meta.k8s.io/{shown.version}"
            rows = [partial_metadata(obj, shown.version) for obj in items]
            return {"kind": kind, "apiVersion": version, "metadata": metadata, "items": rows}
        return {"kind": resource.list_name, "apiVersion": resource.api_version, "metadata": metadata, "items": items}

    async def _delete_collection(self, request: web.Request, target: Target) -> web.Response:
        options = await read_delete_options(request)
        matches = _matcher(request, target)
        key = target.resource.key
        deleted = []
        for obj in self._registry.list(key, target.namespace):
            if matches is not None and not matches(obj):
                continue
            metadata = obj["metadata"]
            try:
                last = self._registry.delete(
                    key, metadata.get("namespace", ""), metadata["name"], grace_s=options.grace_s, uid=options.uid,
                    resource_version=options.resource_version, propagation=options.propagation, dry_run=options.dry_run,
                )  # fmt: skip
                deleted.append(last)
            except ApiError as error:
                if error.code != 404:  # a subscriber of an earlier deletion may have taken it along
                    raise
        metadata = {"resourceVersion": str(self._registry.store.revision)}
        return json_response(self._as_list(target, deleted, AS_IT_IS, metadata))

    async def _watch(self, request: web.Request, target: Target) -> web.StreamResponse:
        shown = wanted_form(request)
        matches = _matcher(request, target)
        since, timeout = number(request, "resourceVersion"), number(request, "timeoutSeconds", digits=9)
        initial = _wants_initial_events(request)
        store = self._registry.store
        if initial and since and since > store.revision:
            raise too_large(since, store.revision)
        options = WatchOptions(
            matches=matches,
            since=since if since and not initial else None,
            mark_end=bool(initial),
            bookmarks=flag(request, "allowWatchBookmarks"),
            timeout_s=float(timeout) if timeout else None,
            render=self._renderer(target, shown),
        )
        if initial is False:  # asked not to have them: only what comes from now on
            options = WatchOptions(
                matches=matches, since=since or store.revision, mark_end=False, bookmarks=options.bookmarks,
                timeout_s=options.timeout_s, render=options.render,
            )  # fmt: skip
        watcher = Watcher(request, target, options, store, self._lines)
        # From here to `run` nothing waits: the state that is sent and the events after it have no gap between them.
        watcher.start()
        self._watchers.add(watcher)
        try:
            return await watcher.run()
        finally:
            self._watchers.discard(watcher)
            watcher.stop()

    def _renderer(self, target: Target, shown: Shown) -> Callable[[Object], Object] | None:
        resource = target.resource
        if shown.form == "table":
            table = self._tables.watch_table(resource, shown)
            return lambda obj: table(_in_version(obj, resource))
        if shown.form == "metadata":
            return lambda obj: partial_metadata(obj, shown.version)
        if resource.is_custom:
            return lambda obj: _in_version(obj, resource)
        return None


def _wants_initial_events(request: web.Request) -> bool | None:
    """Return ``sendInitialEvents``, or None when it is not given.

    Raises:
        ApiError: 422, which makes clients list and watch instead, for combinations that Kubernetes refuses.
    """
    match = request.query.get("resourceVersionMatch", "")
    if "sendInitialEvents" not in request.query:
        if match:
            raise _bad_watch(
                "resourceVersionMatch",
                "Forbidden: resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            )
        return None
    if match != "NotOlderThan":
        why = "Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
        raise _bad_watch("resourceVersionMatch", why)
    return flag(request, "sendInitialEvents")


def _bad_watch(field: str, detail: str) -> ApiError:
    text = f'ListOptions.meta.k8s.io "" is invalid: {field}: {detail}'
    return ApiError(422, "Invalid", text, causes=[Cause(field, detail, "FieldValueForbidden")])


def _in_version(obj: Object, resource: Resource) -> Object:
    """Return an object as the version that was asked for shows it: conversion strategy None changes the name alone."""
    return obj if obj.get("apiVersion") == resource.api_version else {**obj, "apiVersion": resource.api_version}


def _matcher(request: web.Request, target: Target) -> Matcher | None:
    label_selector, field_selector = request.query.get("labelSelector", ""), request.query.get("fieldSelector", "")
    return parse_selectors(label_selector, field_selector, target.resource.key)
