"""A Kubernetes object against the field names and types of its kind, with a place for everything that does not fit.

The API's own decoder (`kinds.schema`) says the same in Go's words and without a place; a file deserves its line and a
suggestion. What fits comes back without what does not, so that the rest can be checked by the rules of its kind.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from testbed.manifests.kinds.fields import STRUCTS
from testbed.manifests.kinds.schema import leaf_problems
from testbed.manifests.source import FieldPath
from testbed.manifests.text import closest, describe_value, format_path, unknown_field

_LEAVES: dict[str, tuple[tuple[type, ...], str]] = {
    "string": ((str,), "text"),
    "[]uint8": ((str,), "text in base64"),
    "Time": ((str,), "a time"),
    "bool": ((bool,), "true or false"),
    "int32": ((int,), "a whole number"),
    "int64": ((int,), "a whole number"),
    "float64": ((int, float), "a number"),
    "IntOrString": ((int, str), "a whole number or text"),
    "Quantity": ((int, float, str), "a quantity such as 100Mi"),
}
_BITS = {"int32": 32, "int64": 64, "IntOrString": 32}
_GONE = object()


class Misfit(NamedTuple):
    """A field, a message that names it, and the field whose value is unknown for it: itself, or what it was meant to be."""

    path: FieldPath
    message: str
    unread: FieldPath


def fit_object(obj: dict[str, Any], struct: str | None) -> tuple[dict[str, Any], list[Misfit]]:
    """Return a copy without what does not fit, and each unknown field and each value of the wrong type.

    Items of lists keep their places, and those of maps their keys: one that does not fit is empty in the copy.

    Args:
        struct: The name of the object's type in `kinds.fields`; None when it is not known, and only its metadata is looked at.
    """
    misfits: list[Misfit] = []
    if struct is not None:
        fitting = _walk(obj, f"v1.{struct}", (), misfits)
    else:
        fitting = dict(obj)
        metadata = _walk(obj.get("metadata"), "v1.ObjectMeta", ("metadata",), misfits)
        fitting["metadata"] = {} if metadata is _GONE else metadata
    return fitting, misfits


def _walk(value: Any, wanted: str, path: FieldPath, misfits: list[Misfit]) -> Any:
    if value is None:
        return None  # the same as leaving it out
    if wanted in _LEAVES:
        return _walk_leaf(value, wanted, path, misfits)
    if wanted.startswith("[]"):
        if not isinstance(value, list):
            return _refuse(path, "a list", value, misfits)
        items = [_walk(inner, wanted[2:], (*path, index), misfits) for index, inner in enumerate(value)]
        return [_empty(wanted[2:]) if item is _GONE else item for item in items]
    if wanted.startswith("map[string]"):
        if not isinstance(value, dict):
            return _refuse(path, "a mapping", value, misfits)
        inner_type = wanted.removeprefix("map[string]")
        walked = {key: _walk(inner, inner_type, (*path, key), misfits) for key, inner in value.items()}
        return {key: _empty(inner_type) if inner is _GONE else inner for key, inner in walked.items()}
    fields = STRUCTS.get(wanted.removeprefix("v1.")) if wanted.startswith("v1.") else None
    return value if fields is None else _walk_struct(value, fields, path, misfits)


def _walk_struct(value: Any, fields: dict[str, str], path: FieldPath, misfits: list[Misfit]) -> Any:
    if not isinstance(value, dict):
        return _refuse(path, "a mapping", value, misfits)
    fitting = {}
    for name, inner in value.items():
        if name not in fields:
            text = unknown_field(name, fields)
            message = f"{format_path(path)}: {text}" if path else text
            misfits.append(Misfit((*path, name), message, (*path, closest(name, fields) or name)))
            continue
        walked = _walk(inner, fields[name], (*path, name), misfits)
        if walked is not _GONE:
            fitting[name] = walked
    return fitting


def _walk_leaf(value: Any, wanted: str, path: FieldPath, misfits: list[Misfit]) -> Any:
    types, noun = _LEAVES[wanted]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        return _refuse(path, noun, value, misfits)
    bits = _BITS.get(wanted, 0)
    if bits and isinstance(value, int) and not -(1 << bits - 1) <= value < 1 << bits - 1:
        return _refuse(path, f"a whole number of {bits} bits", value, misfits)
    problems = leaf_problems(value, wanted)
    if problems:
        misfits += [Misfit(path, f"{format_path(path)}: {problem}", path) for problem in problems]
        return _GONE
    return value


def _empty(wanted: str) -> Any:
    if wanted.startswith("[]") and wanted not in _LEAVES:
        return []
    if wanted in _LEAVES:
        return 0 if int in _LEAVES[wanted][0] and str not in _LEAVES[wanted][0] else ""
    return {}


def _refuse(path: FieldPath, noun: str, value: Any, misfits: list[Misfit]) -> Any:
    shown = format_path(path)
    words = f"wants {noun}, got {describe_value(value)}"
    misfits.append(Misfit(path, f"{shown}: {words}" if shown else words, path))
    return _GONE
