"""Structural schemas of custom resources: pruning, defaults, validation, unknown fields.

``openAPIV3Schema`` is OpenAPI 3.0; jsonschema wants JSON Schema, so ``nullable`` and ``x-kubernetes-int-or-string``
become lists of types, and patterns that Python cannot read are left out. CEL rules (``x-kubernetes-validations``) are
stored and not evaluated.

Source: apiextensions-apiserver pkg/apiserver/schema/{pruning,defaulting}, pkg/apiserver/validation (v1.30).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from testbed.errors import Cause
from testbed.manifests.kinds.causes import Causes, GoText, go_quote, go_value
from testbed.model.json_values import copy_value
from testbed.model.objects import Object

Schema = dict[str, Any]
_TYPE_META = frozenset({"apiVersion", "kind", "metadata"})
_INT_OR_STRING = "x-kubernetes-int-or-string"
_PRESERVE = "x-kubernetes-preserve-unknown-fields"
_EMBEDDED = "x-kubernetes-embedded-resource"
_KEPT_KEYWORDS = (
    *("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "required"),
    *("minLength", "maxLength", "minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties"),
)


def prune(value: Any, schema: Schema, *, is_root: bool = False) -> Any:
    """Return a value without the fields that its schema does not know. Nothing is changed in place."""
    if isinstance(value, dict):
        properties, additional = schema.get("properties") or {}, schema.get("additionalProperties")
        keeps_unknown = bool(schema.get(_PRESERVE))
        kept = _TYPE_META if is_root or schema.get(_EMBEDDED) else frozenset()
        pruned: Object = {}
        for key, item in value.items():
            if key in kept:
                pruned[key] = item
            elif key in properties:
                pruned[key] = prune(item, properties[key])
            elif isinstance(additional, dict):
                pruned[key] = prune(item, additional)
            elif keeps_unknown or additional is True:
                pruned[key] = item
        return pruned
    if isinstance(value, list):
        inner = schema.get("items")
        return [prune(item, inner) for item in value] if isinstance(inner, dict) else value
    return value


def unknown_fields(value: Any, schema: Schema, path: str = "", *, is_root: bool = False) -> Iterator[str]:
    """Yield the paths of the fields that `prune` would drop."""
    if isinstance(value, dict):
        properties, additional = schema.get("properties") or {}, schema.get("additionalProperties")
        kept = _TYPE_META if is_root or schema.get(_EMBEDDED) else frozenset()
        for key, item in value.items():
            here = f"{path}.{key}" if path else str(key)
            if key in kept:
                continue
            if key in properties:
                yield from unknown_fields(item, properties[key], here)
            elif isinstance(additional, dict):
                yield from unknown_fields(item, additional, here)
            elif not schema.get(_PRESERVE) and additional is not True:
                yield here
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, item in enumerate(value):
            yield from unknown_fields(item, schema["items"], f"{path}[{index}]")


def default_in_place(value: Any, schema: Schema) -> None:
    """Drop nulls that may not be there and fill in defaults, in a value that is the caller's own."""
    if isinstance(value, dict):
        properties = schema.get("properties") or {}
        for key, inner in properties.items():
            if key in value and value[key] is None and not inner.get("nullable"):
                del value[key]
            if key not in value and "default" in inner:
                value[key] = copy_value(inner["default"])
            if key in value:
                default_in_place(value[key], inner)
        additional = schema.get("additionalProperties")
        if isinstance(additional, dict):
            for key, item in value.items():
                if key not in properties:
                    default_in_place(item, additional)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for item in value:
            default_in_place(item, schema["items"])


def json_schema(schema: Schema, *, is_root: bool = False) -> Schema:
    """Return the JSON Schema (draft 4) that says the same."""
    converted: Schema = {key: schema[key] for key in _KEPT_KEYWORDS if key in schema}
    if schema.get(_INT_OR_STRING):
        converted["type"] = ["integer", "string"]
    if schema.get("nullable") and "type" in converted:
        types = converted["type"]
        converted["type"] = [*(types if isinstance(types, list) else [types]), "null"]
        if "enum" in converted:
            converted["enum"] = [*converted["enum"], None]
    if "pattern" in schema and _is_readable(schema["pattern"]):
        converted["pattern"] = schema["pattern"]
    for keyword in ("properties",):
        if keyword in schema:
            inner = {name: json_schema(each) for name, each in schema[keyword].items()}
            # the server has its own, stricter rules for these
            converted[keyword] = {name: each for name, each in inner.items() if not is_root or name not in _TYPE_META}
    for keyword in ("items", "additionalProperties", "not"):
        if isinstance(schema.get(keyword), dict):
            converted[keyword] = json_schema(schema[keyword])
    for keyword in ("allOf", "anyOf", "oneOf"):
        if keyword in schema:
            converted[keyword] = [json_schema(each) for each in schema[keyword]]
    return converted


def _is_readable(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False  # Go's own syntax (RE2), such as \pL
    return True


class SchemaValidator:
    """Checks objects against one version's schema; made once for each."""

    def __init__(self, schema: Schema) -> None:
        import jsonschema

        self._validator = jsonschema.Draft4Validator(json_schema(schema, is_root=True))

    def causes(self, obj: Object) -> list[Cause]:
        """Return what does not fit, in the words of the real server, in the order of the object."""
        causes = Causes()
        for error in sorted(self._validator.iter_errors(obj), key=lambda error: [str(part) for part in error.path]):
            _add_cause(error, causes)
        return causes


def _add_cause(error: Any, causes: Causes) -> None:
    path = _path_text(error.absolute_path)
    keyword, wanted, value = error.validator, error.validator_value, error.instance
    shown = GoText(go_value(value)) if isinstance(value, (str, bool, int, float)) else GoText(_json_text(value))
    name = path or "<nil>"
    match keyword:
        case "required":
            missing = next((field for field in wanted if field not in value and f"'{field}'" in error.message), "")
            causes.required(f"{path}.{missing}" if path else missing)
        case "type":
            types = [one for one in (wanted if isinstance(wanted, list) else [wanted]) if one != "null"]
            have = _type_name(value)
            causes.invalid(name, have, f"{path} in body must be of type {','.join(types)}: {go_quote(have)}")
        case "enum":
            causes.unsupported(name, shown, [str(one) for one in wanted if one is not None])
        case "minimum" | "maximum":
            exclusive = error.schema.get(f"exclusive{keyword.capitalize()}")
            relation = ("greater" if keyword == "minimum" else "less") + " than" + ("" if exclusive else " or equal to")
            causes.invalid(name, shown, f"{path} in body should be {relation} {wanted}")
        case "pattern":
            causes.invalid(name, shown, f"{path} in body should match '{wanted}'")
        case "minLength":
            causes.invalid(name, shown, f"{path} in body should be at least {wanted} chars long")
        case "maxLength":
            causes.append(Cause(name, f"Too long: may not be longer than {wanted}", "FieldValueTooLong"))
        case "minItems":
            causes.invalid(name, len(value), f"{path} in body should have at least {wanted} items")
        case "maxItems":
            causes.too_many(name, len(value), wanted)
        case "multipleOf":
            causes.invalid(name, shown, f"{path} in body should be a multiple of {wanted}")
        case "minProperties" | "maxProperties":
            bound = "at least" if keyword == "minProperties" else "at most"
            causes.invalid(name, len(value), f"{path} in body should have {bound} {wanted} properties")
        case _:  # anyOf, oneOf, allOf, not
            words = {"anyOf": "at least one schema (anyOf)", "oneOf": "one and only one schema (oneOf)"}
            rule = words.get(keyword, f"all the schemas ({keyword})")
            causes.invalid(name, shown, f"{path} in body must validate {rule}")


def _path_text(path: Any) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _type_name(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names: tuple[tuple[type, str], ...] = ((int, "integer"), (float, "number"), (str, "string"), (list, "array"))
    return next((name for kind, name in names if isinstance(value, kind)), "object")


def _json_text(value: Any) -> str:
    import json

    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)[:200]
