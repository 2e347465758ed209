"""Decode JSON into the types of a kind: a copy without nulls and unknown fields, and what does not fit.

As upstream's decoder does: a null is an absent field, an unknown field is dropped (and reported by `find_unknown`), a
value of the wrong type refuses the whole object with a 400. After this, validation can rely on every type.

Source of the texts: Go encoding/json UnmarshalTypeError; apimachinery util/intstr, api/resource (v1.30).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from testbed.manifests.kinds.fields import KINDS, STRUCTS
from testbed.model.json_values import copy_value
from testbed.model.objects import BY_KIND, Object

#: value, where it is (a Go struct's field path), problems found so far -> decoded value
Decoder = Callable[[Any, str, list[str]], Any]

QUANTITY = re.compile(r"([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)")
_QUANTITY_TEXT = "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
_DECODERS: dict[str, Decoder] = {}


def _json_name(value: Any) -> str:
    """Return what Go calls a JSON value."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _misfit(value: Any, where: str, type_: str) -> str:
    shown = f"number {value}" if _json_name(value) == "number" and type_ in ("int32", "int64") else _json_name(value)
    return f"json: cannot unmarshal {shown} into Go struct field {where} of type {type_}"


def _plain(type_: str, expected: type, zero: Any) -> Decoder:
    def decode(value: Any, where: str, problems: list[str]) -> Any:
        if type(value) is not expected:
            problems.append(_misfit(value, where, type_))
            return zero
        return value

    return decode


def _integer(type_: str, bits: int) -> Decoder:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1

    def decode(value: Any, where: str, problems: list[str]) -> Any:
        if type(value) is not int or not low <= value <= high:
            problems.append(_misfit(value, where, type_))
            return 0
        return value

    return decode


def _decode_float(value: Any, where: str, problems: list[str]) -> Any:
    if type(value) not in (int, float):
        problems.append(_misfit(value, where, "float64"))
        return 0
    return value


def _decode_int_or_string(value: Any, where: str, problems: list[str]) -> Any:
    if type(value) is str:
        return value
    if type(value) is not int or not -(1 << 31) <= value < 1 << 31:
        shown = f"number {value}" if _json_name(value) == "number" else _json_name(value)
        problems.append(f"json: cannot unmarshal {shown} into Go value of type int32")
        return 0
    return value


def _decode_quantity(value: Any, where: str, problems: list[str]) -> Any:
    text = str(value) if type(value) in (int, float) else value
    if type(text) is not str or len(text) > 64 or not QUANTITY.fullmatch(text):
        problems.append(_QUANTITY_TEXT)
        return "0"
    return text


def _decode_time(value: Any, where: str, problems: list[str]) -> Any:
    if type(value) is not str:
        problems.append(_misfit(value, where, "string"))
        return ""
    try:
        datetime.fromisoformat(value)
        fits = "T" in value
    except ValueError:
        fits = False
    if not fits:
        layout = "2006-01-02T15:04:05Z07:00"
        problems.append(f'parsing time "{value}" as "{layout}": cannot parse "{value}" as "2006"')
    return value


def _decode_bytes(value: Any, where: str, problems: list[str]) -> Any:
    if type(value) is not str:
        problems.append(_misfit(value, where, "[]uint8"))
        return ""
    try:
        base64.b64decode(value.replace("\n", "").replace("\r", "").encode(), validate=True)
    except (binascii.Error, ValueError):
        bad = re.search(r"[^A-Za-z0-9+/=\r\n]", value)
        problems.append(f"illegal base64 data at input byte {bad.start() if bad else len(value)}")
    return value


def _decode_any(value: Any, where: str, problems: list[str]) -> Any:
    return copy_value(value)


def _list_of(type_: str) -> Decoder:
    inner = _decoder(type_)
    empty: Any = {"string": "", "int32": 0, "int64": 0}.get(type_, {})

    def decode(value: Any, where: str, problems: list[str]) -> Any:
        if type(value) is not list:
            problems.append(_misfit(value, where, f"[]{type_}"))
            return []
        return [inner(empty if item is None else item, where, problems) for item in value]

    return decode


def _map_of(type_: str) -> Decoder:
    inner = _decoder(type_)
    empty: Any = "" if type_ in ("string", "[]uint8") else "0" if type_ == "Quantity" else {}

    def decode(value: Any, where: str, problems: list[str]) -> Any:
        if type(value) is not dict:
            problems.append(_misfit(value, where, f"map[string]{type_}"))
            return {}
        return {key: inner(empty if item is None else item, where, problems) for key, item in value.items()}

    return decode


def _struct(name: str) -> Decoder:
    fields: dict[str, Decoder] = {}

    def decode(value: Any, where: str, problems: list[str]) -> Any:
        if not fields:  # filled at first use: structs contain each other
            fields.update({field: _decoder(type_) for field, type_ in STRUCTS[name].items()})
        if type(value) is not dict:
            problems.append(_misfit(value, where, f"v1.{name}"))
            return {}
        path = where.partition(".")[2]
        prefix = f"{name}.{path}." if path else f"{name}."
        decoded = {}
        for key, item in value.items():
            if item is not None and key in fields:
                decoded[key] = fields[key](item, prefix + key, problems)
        return decoded

    return decode


def _decoder(type_: str) -> Decoder:
    found = _DECODERS.get(type_)
    if found is None:
        if type_.startswith("[]"):
            found = _list_of(type_[2:])
        elif type_.startswith("map[string]"):
            found = _map_of(type_[11:])
        else:
            found = _struct(type_.removeprefix("v1."))
        _DECODERS[type_] = found
    return found


_DECODERS.update(
    {
        "string": _plain("string", str, ""),
        "bool": _plain("bool", bool, False),
        "int32": _integer("int32", 32),
        "int64": _integer("int64", 64),
        "float64": _decode_float,
        "IntOrString": _decode_int_or_string,
        "Quantity": _decode_quantity,
        "Time": _decode_time,
        "[]uint8": _decode_bytes,
        "any": _decode_any,
    }
)


def leaf_problems(value: Any, type_: str) -> list[str]:
    """Return what the decoder says of a value that is no struct, list or map."""
    problems: list[str] = []
    _DECODERS[type_](value, type_, problems)
    return problems


def struct_of(obj: Object) -> str | None:
    """Return the struct of an object by its apiVersion and kind, or None for a kind without a table."""
    resource = BY_KIND.get((str(obj.get("apiVersion", "")), str(obj.get("kind", ""))))
    return KINDS.get(resource.key) if resource else None


def decode_object(obj: Object) -> tuple[Object, list[str]]:
    """Return a copy that fits the types of the kind, and what did not fit."""
    problems: list[str] = []
    struct = struct_of(obj)
    if struct is None:
        new: Object = copy_value(obj)
        new["metadata"] = _decoder("v1.ObjectMeta")(new.get("metadata") or {}, f"{obj.get('kind')}.metadata", problems)
    else:
        new = _decoder(f"v1.{struct}")(obj, struct, problems)
        new.setdefault("metadata", {})
    return new, problems


def find_unknown(obj: Object) -> Iterator[str]:
    """Yield the path of every field that the object's kind does not have, in the order of the text."""
    struct = struct_of(obj)
    if struct is not None:
        yield from _unknown(obj, f"v1.{struct}", "")


def _unknown(value: Any, type_: str, path: str) -> Iterator[str]:
    if type_.startswith("[]v1.") and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown(item, type_[2:], f"{path}[{index}]")
    elif type_.startswith("map[string]v1.") and isinstance(value, dict):
        for key, item in value.items():
            yield from _unknown(item, type_[11:], f"{path}.{key}")
    elif type_.startswith("v1.") and isinstance(value, dict):
        fields = STRUCTS[type_[3:]]
        for key, item in value.items():
            inner = f"{path}.{key}" if path else str(key)
            if key not in fields:
                yield inner
            else:
                yield from _unknown(item, fields[key], inner)


def known_fields(obj: Object, path: str) -> list[str]:
    """Return the field names that are allowed beside the one at ``path``; for suggestions."""
    struct = struct_of(obj)
    for part in re.sub(r"\[\d+\]", "", path).split(".")[:-1]:
        type_ = STRUCTS.get(struct or "", {}).get(part, "")
        struct = type_.removeprefix("[]").removeprefix("map[string]").removeprefix("v1.")
    return sorted(STRUCTS.get(struct or "", ()))
