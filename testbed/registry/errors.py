"""The API's refusals, in Kubernetes' words. Source: apimachinery/pkg/api/errors/errors.go (v1.30)."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.errors import ApiError, Cause
from testbed.model.objects import Resource


def bad_request(message: str) -> ApiError:
    """Return a 400."""
    return ApiError(400, "BadRequest", message)


def undecodable(kind: Resource, why: str) -> ApiError:
    """Return the 400 for an object that does not fit its kind's types or fields."""
    return bad_request(f'{kind.kind} in version "{kind.version}" cannot be handled as a {kind.kind}: {why}')


def forbidden(kind: Resource, name: str, why: str, causes: Sequence[Cause] = ()) -> ApiError:
    """Return a 403: ``namespaces "default" is forbidden: …``."""
    details = {"name": name, "kind": kind.plural, **({"group": kind.group} if kind.group else {})}
    return ApiError(403, "Forbidden", f'{kind.key} "{name}" is forbidden: {why}', causes=causes, details=details)


def invalid(kind: Resource, name: str, causes: Sequence[Cause]) -> ApiError:
    """Return a 422: one problem in one line, several in brackets; the causes carry each."""
    unique = list(dict.fromkeys(causes))  # as upstream's ToAggregate
    text = str(unique[0]) if len(unique) == 1 else f"[{', '.join(map(str, unique))}]"
    details = {"name": name, "kind": kind.kind, **({"group": kind.group} if kind.group else {})}
    return ApiError(
        422, "Invalid", f'{kind.qualified_kind} "{name}" is invalid: {text}', causes=causes, details=details
    )
