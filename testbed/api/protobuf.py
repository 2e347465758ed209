"""Bodies in Kubernetes' protobuf, which clients made with client-go send for the built-in kinds. Read only: we answer in JSON.

::

    "k8s\\0"  Unknown{typeMeta{apiVersion, kind}, raw}      raw is the object's own message

Messages are proto2, but most Go fields are not pointers and are sent even when they are empty. JSON leaves those out, so
we do, too, where the Go type has no way to tell empty from absent.
Source: kubernetes apimachinery pkg/runtime/serializer/protobuf, pkg/runtime/generated.proto (v1.30).
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from testbed.model.objects import Object
from testbed.registry.errors import bad_request

CONTENT_TYPE = "application/vnd.kubernetes.protobuf"
_MAGIC = b"k8s\x00"
_MAX_DEPTH = 100
#: Numbers that are pointers in Go: 0 is something that somebody has said.
_KEPT_ZEROS = frozenset(
    "replicas backoffLimit completions parallelism activeDeadlineSeconds ttlSecondsAfterFinished revisionHistoryLimit "  # noqa: SIM905
    "terminationGracePeriodSeconds runAsUser runAsGroup fsGroup tolerationSeconds defaultMode mode priority partition "
    "gracePeriodSeconds deletionGracePeriodSeconds successfulJobsHistoryLimit failedJobsHistoryLimit minReplicas "
    "startingDeadlineSeconds stabilizationWindowSeconds expirationSeconds timeoutSeconds podPidsLimit".split()
)
_KEPT_EMPTY = frozenset({"storageClassName"})


class _Malformed(ValueError):
    """The bytes are not the message they should be."""


def parse_protobuf(body: bytes) -> Object:
    """Return the object in a body.

    Raises:
        ApiError: 400 when it is none.
    """
    from testbed.api.protobuf_fields import MESSAGES

    if body[:4] != _MAGIC:
        raise bad_request("couldn't parse the body of the request as protobuf: it does not begin with k8s\\x00")
    try:
        unknown = dict(read_fields(body[4:]))
        type_meta = dict(read_fields(_bytes(unknown.get(1, b""))))
        api_version, kind = _text(type_meta.get(1, b"")), _text(type_meta.get(2, b""))
        raw = _bytes(unknown.get(2, b""))
        group, _, version = api_version.rpartition("/")
        if (group or version, kind) in (
            ("v1", "DeleteOptions"),
            ("meta.k8s.io", "DeleteOptions"),
        ) or kind == "DeleteOptions":
            message = "meta.v1.DeleteOptions"
        else:
            message = f"{(group or 'core').partition('.')[0]}.{version}.{kind}"
        if message not in MESSAGES:
            raise _Malformed(f'no kind "{kind}" in version "{api_version}" is known in protobuf; send JSON')
        decoded = _message(raw, message, 0)
    except (_Malformed, UnicodeDecodeError, RecursionError, msgspec.DecodeError, OverflowError) as error:
        raise bad_request(f"couldn't parse the body of the request as protobuf: {error}") from None
    return {"apiVersion": api_version, "kind": kind, **decoded}


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a message in order: number, and an integer or the bytes of what is in it."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise _Malformed("a field has number 0")
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise _Malformed(f"field {number} has wire type {wire}")
        if at + length > end:
            raise _Malformed(f"field {number} is cut off")
        yield number, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise _Malformed("a number is cut off or too long")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _Malformed("a number is where text or a message should be")
    return value


def _text(value: int | bytes) -> str:
    return _bytes(value).decode()


def _message(raw: bytes, name: str, depth: int) -> Object:
    from testbed.api.protobuf_fields import MESSAGES

    if depth > _MAX_DEPTH:
        raise _Malformed("nested too deeply")
    fields = MESSAGES[name]
    decoded: Object = {}
    for number, value in read_fields(raw):
        if number not in fields:
            continue
        field, type_ = fields[number]
        if type_.startswith("[]"):
            decoded.setdefault(field, []).append(_value(value, type_[2:], depth))
        elif type_.startswith("map[string]"):
            entry = dict(read_fields(_bytes(value)))
            inner = _value(entry.get(2, b""), type_[11:], depth) if 2 in entry else _zero(type_[11:])
            decoded.setdefault(field, {})[_text(entry.get(1, b""))] = inner
        elif not field:
            decoded |= _value(value, type_, depth)
        else:
            item = _value(value, type_, depth)
            if not _is_empty(field, item):
                decoded[field] = item
    return decoded


def _zero(type_: str) -> Any:
    return {"string": "", "bytes": "", "int": 0, "bool": False}.get(type_, {})


def _is_empty(field: str, item: Any) -> bool:
    if item is None:
        return True
    if item == "":
        return field not in _KEPT_EMPTY
    return type(item) is int and item == 0 and field not in _KEPT_ZEROS


def _value(value: int | bytes, type_: str, depth: int) -> Any:
    if type_ == "string":
        return _text(value)
    if type_ in ("int", "bool"):
        if not isinstance(value, int):
            raise _Malformed("bytes are where a number should be")
        signed = value - (1 << 64) if value >= 1 << 63 else value
        return bool(signed) if type_ == "bool" else signed
    raw = _bytes(value)
    if type_ == "bytes":
        return base64.b64encode(raw).decode()
    if type_ == "double":
        if len(raw) != 8:
            raise _Malformed("a number is cut off")
        return float(struct.unpack("<d", raw)[0])
    special = _SPECIAL.get(type_)
    return special(raw) if special else _message(raw, type_, depth + 1)


def _int_or_string(raw: bytes) -> int | str:
    fields = dict(read_fields(raw))
    if fields.get(1, 0) == 1:
        return _text(fields.get(3, b""))
    number: int = _value(fields.get(2, 0), "int", 0)
    return number


def _quantity(raw: bytes) -> str:
    return _text(dict(read_fields(raw)).get(1, b""))


def _time(raw: bytes, *, micro: bool = False) -> str | None:
    fields = dict(read_fields(raw))
    seconds, nanos = (_value(fields.get(number, 0), "int", 0) for number in (1, 2))
    if not fields or (seconds <= 0 and not nanos):
        return None
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds, microseconds=nanos // 1000)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ" if micro else "%Y-%m-%dT%H:%M:%SZ")


def _raw_json(raw: bytes) -> Any:
    text = _bytes(dict(read_fields(raw)).get(1, b""))
    return msgspec.json.decode(text) if text else None


def _items(raw: bytes) -> list[str]:
    return [_text(value) for number, value in read_fields(raw) if number == 1]


_SPECIAL: dict[str, Callable[[bytes], Any]] = {
    "util.intstr.IntOrString": _int_or_string,
    "api.resource.Quantity": _quantity,
    "meta.v1.Time": _time,
    "meta.v1.MicroTime": lambda raw: _time(raw, micro=True),
    "meta.v1.FieldsV1": _raw_json,
    "runtime.RawExtension": _raw_json,
    "authentication.v1.ExtraValue": _items,
    "authorization.v1.ExtraValue": _items,
}
