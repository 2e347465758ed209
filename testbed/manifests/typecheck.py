"""A Kubernetes object against the field names and types of its kind, with a path for everything that does not fit.

The API's own decoder (`kinds`) says the same in Go's words and without a place; a file deserves its line and a suggestion.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from testbed.manifests.kinds.fields import KINDS, STRUCTS
from testbed.manifests.text import describe_value, unknown_field
from testbed.model.objects import BY_KIND, Object

_LEAVES: dict[str, tuple[tuple[type, ...], str]] = {
    "string": ((str,), "text"),
    "[]uint8": ((str,), "text in base64"),
    "Time": ((str,), "a time"),
    "MicroTime": ((str,), "a time"),
    "bool": ((bool,), "true or false"),
    "int32": ((int,), "a whole number"),
    "int64": ((int,), "a whole number"),
    "float64": ((int, float), "a number"),
    "IntOrString": ((int, str), "a whole number or text"),
    "Quantity": ((int, float, str), "a quantity such as 100Mi"),
}

Finding = tuple[str, str]  # a field's path, a message that names the path


def find_misfits(obj: Object) -> Iterator[Finding]:
    """Yield each unknown field and each value of the wrong type; nothing for kinds that we do not know."""
    resource = BY_KIND.get((obj["apiVersion"], obj["kind"]))
    struct = KINDS.get(resource.key) if resource is not None else None
    if struct is not None:
        yield from _walk(obj, f"v1.{struct}", "")


def _walk(value: Any, wanted: str, path: str) -> Iterator[Finding]:
    if value is None:
        return  # the same as leaving it out
    if wanted in _LEAVES:
        types, noun = _LEAVES[wanted]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            yield _misfit(path, noun, value)
    elif wanted.startswith("[]"):
        if not isinstance(value, list):
            yield _misfit(path, "a list", value)
            return
        for index, inner in enumerate(value):
            yield from _walk(inner, wanted[2:], f"{path}[{index}]")
    elif wanted.startswith("map[string]"):
        if not isinstance(value, dict):
            yield _misfit(path, "a mapping", value)
            return
        for key, inner in value.items():
            yield from _walk(inner, wanted.removeprefix("map[string]"), f"{path}.{key}")
    elif wanted.startswith("v1."):
        yield from _walk_struct(value, STRUCTS.get(wanted.removeprefix("v1.")), path)


def _walk_struct(value: Any, fields: dict[str, str] | None, path: str) -> Iterator[Finding]:
    if fields is None:
        return
    if not isinstance(value, dict):
        yield _misfit(path, "a mapping", value)
        return
    for name, inner in value.items():
        inner_path = f"{path}.{name}" if path else name
        if name in fields:
            yield from _walk(inner, fields[name], inner_path)
        else:
            text = unknown_field(name, fields)
            yield inner_path, f"{path}: {text}" if path else text


def _misfit(path: str, noun: str, value: Any) -> Finding:
    return path, f"{path}: wants {noun}, got {describe_value(value)}"
