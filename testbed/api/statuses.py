"""Errors as Status objects, and answers as JSON."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from testbed.errors import ApiError
from testbed.model.objects import Object
from testbed.registry.errors import bad_request

#: Upstream's limit of a request body (3 MiB).
MAX_BODY_BYTES = 3 * 1024 * 1024
_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_encode = msgspec.json.Encoder().encode


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
        "metadata": {"continue": error.list_continue} if error.list_continue else {},
        "status": "Failure",
        "message": error.message,
        "reason": error.reason,
        **({"details": details} if details else {}),
        "code": error.code,
    }


def success(code: int, **fields: Any) -> web.Response:
    """Return a Status that says it was done."""
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", **fields}
    return json_response({**status, "code": code} if code != 200 else status, code)


def json_response(
    value: Any, code: int = 200, headers: Mapping[str, str] | None = None, *, content_type: str = "application/json"
) -> web.Response:
    """Return a value as JSON."""
    response = web.Response(body=_encode(value), status=code, headers=headers)
    response.headers["Content-Type"] = content_type
    response.headers["Cache-Control"] = "no-cache, private"
    return response


def refusal_response(error: ApiError) -> web.Response:
    """Return the answer that tells a client of an error."""
    headers = {"Retry-After": str(error.details["retryAfterSeconds"])} if "retryAfterSeconds" in error.details else None
    return json_response(status_of(error), error.code, headers)


def unknown_path() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource")


def not_allowed() -> ApiError:
    return ApiError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")


@web.middleware
async def errors_as_status(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every refusal into a Status; what nobody expected is a 500 and in the log."""
    try:
        return await handler(request)
    except ApiError as error:
        return refusal_response(error)
    except web.HTTPRequestEntityTooLarge:
        text = f"Request entity too large: limit is {MAX_BODY_BYTES}"
        return refusal_response(ApiError(413, "RequestEntityTooLarge", text))
    except web.HTTPNotFound:
        return refusal_response(unknown_path())
    except web.HTTPMethodNotAllowed:
        return refusal_response(not_allowed())
    except RecursionError:
        return refusal_response(bad_request("the body of the request is nested too deeply"))
    except ConnectionError:
        if request.transport is not None and not request.transport.is_closing():
            raise
        return web.Response()  # who asked has gone before the answer began: nobody reads it, and it is no error of ours
    except web.HTTPException:
        raise
    except Exception:
        _log.exception("request failed: %s %s", request.method, request.path_qs)
        return refusal_response(ApiError(500, "InternalError", "Internal error occurred: see the lab's log"))
