"""Lists in pages: what ``resourceVersion``, ``limit`` and ``continue`` ask for.

A continue token says where the next page begins and at which revision the first one was read. Pages are consistent
without keeping anything: the store can go back to a revision for as long as its history reaches.

Source: kubernetes apiserver pkg/storage/continue.go, pkg/storage/etcd3/store.go (v1.30).
"""

from __future__ import annotations

import base64
import binascii
import json
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from testbed.api.bodies import number
from testbed.api.paths import Target
from testbed.api.selectors import Matcher
from testbed.errors import ApiError, Cause
from testbed.model.objects import Object
from testbed.registry.errors import bad_request
from testbed.store import Store

_TOO_OLD = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without the "
    "continue parameter, or use the continue token in this response to retrieve the remainder of the results. Continuing "
    "with the provided token results in an inconsistent list - objects that were created, modified, or deleted between the "
    "time the first chunk was returned and now may show up in the list."
)


@dataclass(frozen=True, slots=True)
class Page:
    """Some objects, and the metadata of the list that carries them."""

    items: list[Object]
    metadata: Object


def read_page(request: web.Request, target: Target, store: Store, matches: Matcher | None) -> Page:
    """Return the objects that a list request asks for.

    Raises:
        ApiError: 400 for parameters that make no sense, 410 for a token whose revision is forgotten, 504 for a revision
            that is in the future.
    """
    limit, token = number(request, "limit"), request.query.get("continue", "")
    key, namespace = target.resource.key, target.namespace
    revision, after = store.revision, None
    if token:
        if request.query.get("resourceVersion", "") not in ("", "0"):
            raise bad_request("specifying resource version is not allowed when using continue")
        revision, after = _parse_token(token)
        try:
            found = store.list_at(key, namespace, revision) if revision else store.list(key, namespace)
        except ApiError:
            raise _token_expired(after, store.revision) from None
        revision = revision or store.revision
    else:
        found, revision = _at_version(request, store, key, namespace)
    if after is not None:
        found = found[bisect_right([_place(obj) for obj in found], after) :]
    if matches is not None:
        found = [obj for obj in found if matches(obj)]
    metadata: Object = {"resourceVersion": str(revision)}
    if limit and len(found) > limit:
        remaining = len(found) - limit
        found = found[:limit]
        metadata["continue"] = _token(revision, _place(found[-1]))
        if matches is None:
            metadata["remainingItemCount"] = remaining
    return Page(found, metadata)


def _at_version(request: web.Request, store: Store, key: str, namespace: str | None) -> tuple[list[Object], int]:
    version, match = number(request, "resourceVersion"), request.query.get("resourceVersionMatch", "")
    if match not in ("", "Exact", "NotOlderThan"):
        raise _bad_match("Unsupported value", f'"{match}": supported values: "Exact", "NotOlderThan"')
    if match and version is None:
        raise _bad_match("Forbidden", "resourceVersionMatch is forbidden unless resourceVersion is provided")
    if match == "Exact" and version == 0:
        raise _bad_match("Forbidden", 'resourceVersionMatch "exact" is forbidden for resourceVersion "0"')
    if version is not None and version > store.revision:
        raise too_large(version, store.revision)
    if match == "Exact" and version:
        return store.list_at(key, namespace, version), version
    return store.list(key, namespace), store.revision


def _bad_match(kind: str, detail: str) -> ApiError:
    text = f'ListOptions.meta.k8s.io "" is invalid: resourceVersionMatch: {kind}: {detail}'
    return ApiError(
        422, "Invalid", text, causes=[Cause("resourceVersionMatch", f"{kind}: {detail}", "FieldValueForbidden")]
    )


def too_large(asked: int, current: int) -> ApiError:
    """Return the 504 for a revision that is still to come."""
    cause = Cause("", "Too large resource version", "ResourceVersionTooLarge")
    details: dict[str, Any] = {"retryAfterSeconds": 1}
    text = f"Timeout: Too large resource version: {asked}, current: {current}"
    return ApiError(504, "Timeout", text, causes=[cause], details=details)


def _place(obj: Object) -> tuple[str, str]:
    metadata = obj["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _token(revision: int, last: tuple[str, str]) -> str:
    text = json.dumps({"v": "meta.k8s.io/v1", "rv": revision, "start": list(last)}, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def _parse_token(token: str) -> tuple[int, tuple[str, str]]:
    try:
        value = json.loads(base64.urlsafe_b64decode(token.encode() + b"=" * (-len(token) % 4)))
        revision, (namespace, name) = value["rv"], value["start"]
        if type(revision) is int and isinstance(namespace, str) and isinstance(name, str):
            # -1: go on at whatever is there now
            return max(revision, 0), (namespace, name)
    except (binascii.Error, ValueError, TypeError, KeyError, RecursionError):
        pass
    raise bad_request("continue key is not valid: it is not one that this server has made")


def _token_expired(after: tuple[str, str], revision: int) -> ApiError:
    error = ApiError(410, "Expired", _TOO_OLD)
    error.list_continue = _token(-1, after)
    return error
