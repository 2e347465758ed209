"""A document to a msgspec Struct, with every problem of the document, where msgspec itself stops at the first.

The Struct classes are the only description of our formats: this walker follows them through `msgspec.inspect`, and
`json_schema` writes them as JSON Schema. Rules of the walk:

- An explicit null is the same as leaving a field out, as in Kubernetes.
- A field that is wrong is reported once, and becomes its default (None when it has none), so that everything else can
  still be checked. Struct fields are therefore ``X | None`` even where a value is required.
- A list item that is wrong is left out; `Decoded.path` still gives the rest their places in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import msgspec
import msgspec.inspect as mi

from testbed.errors import Problem
from testbed.manifests.scalars import SCALARS
from testbed.manifests.source import Document, FieldPath
from testbed.manifests.text import describe_value, format_path, suggestion, unknown_field

API_VERSION = "testbed/v1"

S = TypeVar("S", bound="Wire")

_KINDS_OF_VALUE: tuple[tuple[type, tuple[type, ...]], ...] = (
    (bool, (mi.BoolType,)),
    (int, (mi.IntType, mi.FloatType)),
    (float, (mi.FloatType,)),
    (str, (mi.StrType, mi.CustomType, mi.LiteralType, mi.EnumType)),
    (list, (mi.ListType,)),
    (dict, (mi.StructType, mi.DictType)),
)
_BAD = object()


class Wire(msgspec.Struct, forbid_unknown_fields=True, rename="camel", kw_only=True, eq=False):
    """Base of everything that our documents are made of."""


def described(text: str, *, default: Any = None, examples: Sequence[Any] = (), **limits: Any) -> msgspec.Meta:
    """Return what a field's schema says besides its type; tools/reference.py writes it into docs/ as well.

    ``default`` is as a file would have it. One that has to be worked out is the end of the text instead:
    ``the bridge's own address; default: the first one of cidr``. Such a field's type is ``Annotated[X, …] | None``: the
    default of the whole union would be overruled by the None that stands for "not given". Of a Struct it is
    ``Annotated[X | None, …]``, since msgspec drops what is said of a Struct in a union.
    """
    extra = None if default is None else {"default": default}
    return msgspec.Meta(description=text, examples=list(examples) or None, extra_json_schema=extra, **limits)


class Decoded:
    """A document being checked: collects problems, and knows where each Struct was written."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []
        self._wrong: set[FieldPath] = set()
        self._paths: dict[int, tuple[Wire, FieldPath]] = {}  # by id(); the Struct is kept so that the id stays its own

    def decode(self, wire: type[S]) -> S | None:
        """Return the document's value as a Struct; None when it is not even a mapping."""
        found = self._walk(self.document.value, _type_info(wire), ())
        return None if found is _BAD else found

    def path(self, struct: Wire, *steps: str | int) -> FieldPath:
        """Return the place of a Struct, or of a field in it (YAML's spelling)."""
        return (*self._paths[id(struct)][1], *steps)

    def is_unread(self, struct: Wire, field_name: str) -> bool:
        """Say whether a field (YAML's spelling) was given, but was wrong and is reported already."""
        return id(struct) in self._paths and self.path(struct, field_name) in self._wrong

    def line(self, struct: Wire, *steps: str | int) -> int:
        """Return the line of a Struct, or of a field in it."""
        return self.document.line_of(self.path(struct, *steps))

    def refuse(self, struct: Wire, *steps: str | int, reason: str, is_warning: bool = False) -> None:
        """Report what is wrong with a Struct or with a field in it."""
        self._refuse(self.path(struct, *steps), reason, is_warning=is_warning)

    def _refuse(self, path: FieldPath, reason: str, *, is_warning: bool = False, line_path: FieldPath = ()) -> None:
        shown = format_path(path)
        message = f"{shown}: {reason}" if shown else reason
        self.problems.append(Problem(self.document.file, self.document.line_of(line_path or path), message, is_warning))

    def _walk(self, value: Any, wanted: mi.Type, path: FieldPath) -> Any:
        branches = _branches(wanted)
        branch = next((found for found in branches if isinstance(found, _accepted_types(value))), None)
        if branch is None:
            self._refuse(path, f"wants {' or '.join(dict.fromkeys(map(_noun, branches)))}, got {describe_value(value)}")
            return _BAD
        match branch:
            case mi.StructType():
                return self._walk_struct(value, branch, path)
            case mi.DictType():
                return self._walk_dict(value, branch, path)
            case mi.ListType():
                return self._walk_list(value, branch, path)
            case mi.CustomType():
                try:
                    return SCALARS[branch.cls].parse(value)
                except ValueError as error:
                    self._refuse(path, str(error))
                    return _BAD
            case mi.LiteralType():
                return self._one_of(value, tuple(str(text) for text in branch.values), path)
            case mi.IntType():
                return self._within(value, branch, path)
            case mi.FloatType():
                return float(value)
            case mi.StrType():
                return self._checked_text(value, branch, path)
        return value

    def _walk_struct(self, value: dict[str, Any], wanted: mi.StructType, path: FieldPath) -> Wire:
        fields = {field.encode_name: field for field in wanted.fields}
        for name in value:
            if name not in fields:
                self._refuse(path, unknown_field(name, fields), line_path=(*path, name))
        found: dict[str, Any] = {}
        for name, field in fields.items():
            inner = value.get(name)
            if inner is None:
                if field.required:
                    self._refuse(path, f'required field "{name}" is missing')
                    found[field.name] = None
                continue
            decoded = self._walk(inner, field.type, (*path, name))
            if decoded is not _BAD:
                found[field.name] = decoded
                continue
            self._wrong.add((*path, name))
            if field.required:
                found[field.name] = None
        struct: Wire = wanted.cls(**found)  # type: ignore[assignment]  # all our Structs are Wires
        self._paths[id(struct)] = (struct, path)
        return struct

    def _walk_dict(self, value: dict[str, Any], wanted: mi.DictType, path: FieldPath) -> dict[Any, Any]:
        found = {}
        for key, inner in value.items():
            decoded_key = self._walk(key, wanted.key_type, (*path, key))
            decoded = self._walk(inner, wanted.value_type, (*path, key))
            if decoded_key is not _BAD and decoded is not _BAD:
                found[decoded_key] = decoded
        return found

    def _walk_list(self, value: list[Any], wanted: mi.ListType, path: FieldPath) -> list[Any]:
        if wanted.min_length is not None and len(value) < wanted.min_length:
            self._refuse(path, f"wants at least {wanted.min_length}, got {len(value)}")
        if wanted.max_length is not None and len(value) > wanted.max_length:
            self._refuse(path, f"wants at most {wanted.max_length}, got {len(value)}")
        walked = [self._walk(inner, wanted.item_type, (*path, index)) for index, inner in enumerate(value)]
        return [inner for inner in walked if inner is not _BAD]

    def _one_of(self, value: str, allowed: tuple[str, ...], path: FieldPath) -> Any:
        if value in allowed:
            return value
        shown = ", ".join(text for text in allowed if text)
        self._refuse(path, f"{value!r} is not one of {shown}{suggestion(value, allowed)}")
        return _BAD

    def _within(self, value: int, wanted: mi.IntType, path: FieldPath) -> Any:
        low, high = wanted.ge, wanted.le
        if (low is None or value >= low) and (high is None or value <= high):
            return value
        limits = f"from {low} to {high}" if low is not None and high is not None else f"at least {low}"
        self._refuse(path, f"wants a whole number {limits}, got {value}")
        return _BAD

    def _checked_text(self, value: str, wanted: mi.StrType, path: FieldPath) -> Any:
        if wanted.min_length is not None and len(value) < wanted.min_length:
            self._refuse(path, "must not be empty")
            return _BAD
        return value


def json_schema(wire: type[Wire], title: str) -> dict[str, Any]:
    """Return a format as JSON Schema (2020-12), for editors."""
    schema = msgspec.json.schema(wire, schema_hook=_schema_of)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **_without_null(schema)}


def _schema_of(cls: type) -> dict[str, Any]:
    scalar = SCALARS[cls]
    return {"title": scalar.title, "type": "string", **scalar.schema}


def _without_null(schema: Any) -> Any:
    """Drop the null that is in our Structs only to stand for a value that was wrong; descriptions become one line."""
    if isinstance(schema, list):
        return [_without_null(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _without_null(inner) for key, inner in schema.items() if not (key == "default" and inner is None)}
    if isinstance(found.get("description"), str):
        found["description"] = " ".join(found["description"].split())  # docstrings have indented lines
    if isinstance(found.get("enum"), list) and None in found["enum"]:
        found["enum"] = [value for value in found["enum"] if value is not None]
    if isinstance(found.get("anyOf"), list):
        branches = [branch for branch in found["anyOf"] if branch != {"type": "null"}]
        del found["anyOf"]
        found |= branches[0] if len(branches) == 1 else {"anyOf": branches}
    return found


@cache
def _type_info(wire: type[Wire]) -> mi.Type:
    return mi.type_info(wire)


def _branches(wanted: mi.Type) -> list[mi.Type]:
    if isinstance(wanted, mi.Metadata):
        return _branches(wanted.type)
    if isinstance(wanted, mi.UnionType):
        return [branch for inner in wanted.types for branch in _branches(inner) if not isinstance(branch, mi.NoneType)]
    return [wanted]


def _accepted_types(value: Any) -> tuple[type, ...]:
    return next((accepted for cls, accepted in _KINDS_OF_VALUE if isinstance(value, cls)), ())


def _noun(wanted: mi.Type) -> str:
    match wanted:
        case mi.CustomType():
            return SCALARS[wanted.cls].noun
        case mi.LiteralType():
            return f"one of {', '.join(str(value) for value in wanted.values if value)}"
        case mi.BoolType():
            return "true or false"
        case mi.IntType():
            return "a whole number"
        case mi.FloatType():
            return "a number"
        case mi.ListType():
            return "a list"
        case mi.StrType():
            return "text"
    return "a mapping"
