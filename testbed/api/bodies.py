"""Bodies and parameters of requests: read, typed, or refused with a 400."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, get_args

import msgspec
from aiohttp import web

from testbed.api.protobuf import CONTENT_TYPE as PROTOBUF
from testbed.api.protobuf import parse_protobuf
from testbed.errors import ApiError
from testbed.model.objects import Object, Resource
from testbed.registry.errors import bad_request, undecodable
from testbed.registry.registry import Propagation, Registry

_JSON_TYPES = ("application/json", "application/octet-stream", "")
_ACCEPTED = "application/json, application/yaml, application/vnd.kubernetes.protobuf"
_decode = msgspec.json.Decoder().decode


def unsupported_media_type(accepted: str) -> ApiError:
    """Return the 415 that names what is understood."""
    text = f"the body of the request was in an unknown format - accepted media types include: {accepted}"
    return ApiError(415, "UnsupportedMediaType", text)


async def read_object(request: web.Request) -> tuple[Object, list[str]]:
    """Return the object in a body, and the paths of fields that it has twice (of which the last counts)."""
    body = await request.read()
    if request.content_type in _JSON_TYPES:
        return parse_json(body), _duplicates(body)
    if request.content_type == "application/yaml":
        return _parse_yaml(body), []
    if request.content_type == PROTOBUF:
        return parse_protobuf(body), []
    raise unsupported_media_type(_ACCEPTED)


def parse_json(body: bytes) -> Object:
    """Return the JSON object in a body; anything else is the client's mistake."""
    value = parse_any_json(body)
    if not isinstance(value, dict):
        raise bad_request(f"the body of the request is not a JSON object but {type(value).__name__}")
    return value


def parse_any_json(body: bytes) -> Any:
    """Return the JSON value in a body."""
    try:
        return _decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise bad_request(f"couldn't parse the body of the request as JSON: {error}") from None


def _parse_yaml(body: bytes) -> Object:
    import yaml

    try:
        value = yaml.load(body, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
        # through JSON: YAML has dates, sets and numbers that JSON has not
        return parse_json(json.dumps(value, allow_nan=False).encode())
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise bad_request(f"couldn't parse the body of the request as YAML: {reason}") from None


class _Duplicated(dict[str, Any]):
    """An object that had some of its keys twice."""

    twice: tuple[str, ...] = ()


def _duplicates(body: bytes) -> list[str]:
    """Return the paths of keys that occur twice in one object."""
    found = False

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        value = dict(items)
        if len(value) == len(items):
            return value
        found = True
        marked = _Duplicated(items)
        seen: set[str] = set()
        marked.twice = tuple(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return marked

    try:
        value = json.loads(body, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return []  # msgspec has read it; what only json cannot read has no duplicates that we could name
    return list(_duplicate_paths(value, "")) if found else []


def _duplicate_paths(value: Any, path: str) -> list[str]:
    paths: list[str] = []
    if isinstance(value, dict):
        if isinstance(value, _Duplicated):
            paths += [f"{path}.{key}" if path else key for key in dict.fromkeys(value.twice)]
        for key, item in value.items():
            paths += _duplicate_paths(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            paths += _duplicate_paths(item, f"{path}[{index}]")
    return paths


def field_warnings(
    request: web.Request, resource: Resource, registry: Registry, obj: Object, twice: list[str]
) -> dict[str, str] | None:
    """Refuse unknown and repeated fields (``fieldValidation=Strict``) or return headers that warn of them (the default).

    Raises:
        ApiError: 400 in the words of Kubernetes' strict decoder.
    """
    mode = request.query.get("fieldValidation") or "Warn"
    if mode not in ("Ignore", "Warn", "Strict"):
        raise bad_request(f'invalid fieldValidation {mode!r}: supported values: "Ignore", "Warn", "Strict"')
    if mode == "Ignore":
        return None
    typed = {"apiVersion": resource.api_version, "kind": resource.kind, **obj}
    if (typed["apiVersion"], typed["kind"]) != (resource.api_version, resource.kind):
        return None  # the registry refuses it
    problems = [f'duplicate field "{path}"' for path in twice]
    problems += [f'unknown field "{path}"' for path in registry.unknown_fields(resource.key, typed)]
    if problems and mode == "Strict":
        raise undecodable(resource, f"strict decoding error: {', '.join(problems)}")
    return warning_headers(problems)


def warning_headers(problems: list[str]) -> dict[str, str] | None:
    """Return a header that kubectl shows as ``Warning: …``."""
    if not problems:
        return None
    # A header carries ASCII without controls, in quotes (RFC 7234 section 5.5).
    text = ", ".join(problems).encode("ascii", "backslashreplace").decode().replace("\\", "\\\\").replace('"', '\\"')
    text = "".join(char if char.isprintable() else "?" for char in text)
    return {"Warning": f'299 - "{text[:1000]}"'}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteOptions:
    """What a DELETE's body and query ask for."""

    grace_s: int | None
    uid: str
    resource_version: str
    propagation: Propagation
    dry_run: bool


async def read_delete_options(request: web.Request) -> DeleteOptions:
    """Return the options of a DELETE; the query counts where the body says nothing."""
    body = await request.read()
    if not body.strip():
        return delete_options(request, {})
    return delete_options(request, (await read_object(request))[0])


def delete_options(request: web.Request, given: Object) -> DeleteOptions:
    """Return the options that a DeleteOptions object and the query ask for."""
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
        raise bad_request(f'invalid dryRun {dry_run!r}: supported values: "All"')
    return DeleteOptions(
        grace_s=grace,
        uid=str(preconditions.get("uid") or ""),
        resource_version=str(preconditions.get("resourceVersion") or ""),
        propagation=_propagation(request, given),
        dry_run=bool(dry_run) or is_dry_run(request),
    )


def _propagation(request: web.Request, given: Object) -> Propagation:
    policy: Any = given.get("propagationPolicy")
    if policy is None:
        policy = request.query.get("propagationPolicy", "")
    orphan: Any = given.get("orphanDependents")
    if orphan is None and "orphanDependents" in request.query:
        orphan = flag(request, "orphanDependents")
    if orphan is not None and policy:
        detail = "orphanDependents and deletionPropagation cannot be both set"
        raise ApiError(
            422,
            "Invalid",
            f'DeleteOptions.meta.k8s.io "" is invalid: propagationPolicy: Invalid value: "{policy}": {detail}',
        )
    if orphan is not None:
        return "Orphan" if orphan else "Background"
    if policy not in get_args(Propagation):
        text = f'propagationPolicy: Unsupported value: "{policy}": supported values: "Foreground", "Background", "Orphan", "nil"'
        raise ApiError(422, "Invalid", f'DeleteOptions.meta.k8s.io "" is invalid: {text}')
    result: Propagation = policy
    return result


def is_dry_run(request: web.Request) -> bool:
    """Say whether nothing must be stored."""
    values = request.query.getall("dryRun", [])
    if any(value != "All" for value in values):
        raise bad_request(f'invalid dryRun {values!r}: supported values: "All"')
    return bool(values)


def flag(request: web.Request, name: str) -> bool:
    """Return a boolean parameter."""
    # apimachinery's Convert_Slice_string_To_bool: a parameter that is there is true unless it says otherwise
    return name in request.query and request.query[name].lower() not in ("false", "0")


def number(request: web.Request, name: str, digits: int = 18) -> int | None:
    """Return a parameter that is a number, or None when it is not given."""
    text = request.query.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= digits):
        raise bad_request(f'Invalid value: "{text}": strconv.ParseUint: parsing "{text}": invalid syntax')
    return int(text)
