"""PATCH: how each media type changes an object. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jsonpatch
import jsonpointer

from testbed.api.bodies import parse_any_json, unsupported_media_type
from testbed.api.strategic import strategic_merge
from testbed.errors import ApiError
from testbed.manifests.kinds.fields import KINDS
from testbed.model.json_values import merge_patch
from testbed.model.objects import Object, Resource
from testbed.registry.errors import bad_request

JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
_MAX_OPERATIONS = 10_000  # upstream's maxJSONPatchOperations

#: Makes the new state from the present one, which it does not touch.
Change = Callable[[Object], Object]


def accepted_types(resource: Resource) -> tuple[str, ...]:
    """Return the media types that a PATCH of a resource may have."""
    return (JSON_PATCH, MERGE_PATCH) if resource.is_custom else (JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH)


def parse_patch(content_type: str, body: bytes, resource: Resource, subresource: str) -> Change:
    """Return what a patch does.

    Raises:
        ApiError: 400 for a body that is no patch, 415 for a type that is not accepted. The change raises 400 or 422.
    """
    if content_type == APPLY_PATCH:
        raise ApiError(
            415,
            "UnsupportedMediaType",
            "server-side apply is not available here: use `kubectl apply` without --server-side (docs/api.md)",
        )
    if content_type not in accepted_types(resource):
        raise unsupported_media_type(", ".join(accepted_types(resource)))
    patch = parse_any_json(body)
    if content_type == JSON_PATCH:
        return _json_patch(patch)
    if not isinstance(patch, dict):
        raise bad_request("json: cannot unmarshal the patch into a JSON object")
    if content_type == MERGE_PATCH or subresource == "scale":
        return lambda current: _object(merge_patch(current, patch))
    struct = KINDS.get(resource.key, "")
    return lambda current: strategic_merge(current, patch, struct)


def _json_patch(operations: Any) -> Change:
    if not isinstance(operations, list) or not all(isinstance(one, dict) for one in operations):
        raise bad_request("json: cannot unmarshal the patch into a list of JSON patch operations")
    if len(operations) > _MAX_OPERATIONS:
        text = f"The allowed maximum operations in a JSON patch is {_MAX_OPERATIONS}, got {len(operations)}"
        raise ApiError(413, "RequestEntityTooLarge", text)
    try:
        patch = jsonpatch.JsonPatch(operations)
    except (jsonpatch.JsonPatchException, jsonpointer.JsonPointerException, TypeError, ValueError) as error:
        raise bad_request(f"invalid JSON patch: {error}") from None

    def change(current: Object) -> Object:
        try:
            return _object(patch.apply(current))
        except (
            jsonpatch.JsonPatchException,
            jsonpointer.JsonPointerException,
            TypeError,
            ValueError,
            LookupError,
        ) as error:
            text = f"the server rejected our request due to an error in our request: {error}"
            raise ApiError(422, "Invalid", text) from None

    return change


def _object(value: Any) -> Object:
    if not isinstance(value, dict):
        raise bad_request("the patch makes something of the object that is not a JSON object")
    return value
