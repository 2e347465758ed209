"""Strategic merge patches: merge patches that know which lists are merged by a key.

Directives::

    $patch: replace | delete | merge       this object (in a list: this element; replace: the whole list)
    $retainKeys: [a, b]                    fields other than these go
    $deleteFromPrimitiveList/f: [x]        these values leave the set f
    $setElementOrder/f: [...]              how the list f is ordered afterwards

Source: kubernetes apimachinery/pkg/util/strategicpatch/patch.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from testbed.api.merge_keys import MERGE_KEYS, REPLACED
from testbed.manifests.kinds.fields import STRUCTS
from testbed.model.objects import Object
from testbed.registry.errors import bad_request

_PATCH = "$patch"
_RETAIN_KEYS = "$retainKeys"
_DELETE_FROM = "$deleteFromPrimitiveList/"
_ORDER = "$setElementOrder/"


def strategic_merge(original: Object, patch: Object, struct: str) -> Object:
    """Return ``original`` with a patch applied. ``struct`` is the kind's; nothing is changed in place.

    Raises:
        ApiError: 400 for directives that make no sense.
    """
    match patch.get(_PATCH, "merge"):
        case "merge":
            pass
        case "replace":
            return {key: _plain(value) for key, value in patch.items() if key != _PATCH}
        case "delete":
            return {}
        case other:
            raise bad_request(f"Unknown patch type found: {other}")
    merged = _retained(original, patch)
    for key, value in patch.items():
        if key in (_PATCH, _RETAIN_KEYS) or key.startswith(_ORDER):
            continue
        if key.startswith(_DELETE_FROM):
            field = key.removeprefix(_DELETE_FROM)
            gone = _list(value, key)
            if field in merged:
                merged[field] = [item for item in _list(merged[field], field) if item not in gone]
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged_field(merged.get(key), value, struct, key)
    for key, value in patch.items():
        if key.startswith(_ORDER):
            field = key.removeprefix(_ORDER)
            if isinstance(merged.get(field), list):
                merged[field] = _in_order(merged[field], _list(value, key), original.get(field), struct, field)
    return merged


def _merged_field(have: Any, wanted: Any, struct: str, field: str) -> Any:
    inner = _struct_of(struct, field)
    if isinstance(wanted, dict):
        if not isinstance(have, dict) or (struct, field) in REPLACED:
            have = {}
        return strategic_merge(have, wanted, inner)
    if isinstance(wanted, list):
        key = MERGE_KEYS.get(struct, {}).get(field)
        if key is not None:
            return _merged_list(have if isinstance(have, list) else [], wanted, inner, key)
    return _plain(wanted)


def _merged_list(have: list[Any], wanted: list[Any], struct: str, key: str) -> list[Any]:
    if not key:
        if any(isinstance(item, (dict, list)) for item in wanted):
            raise bad_request("a list of plain values cannot be patched with objects")
        merged = [*have, *(item for item in dict.fromkeys(wanted) if item not in have)]
        return _interleaved(merged, wanted, have, lambda item: item)
    elements = []
    result = list(have)
    for item in wanted:
        if not isinstance(item, dict):
            raise bad_request(f"a list of objects cannot be patched with {item!r}")
        directive = item.get(_PATCH)
        if directive == "replace":
            result = []
            continue
        if key not in item:
            raise bad_request(f"map: {item} does not contain declared merge key: {key}")
        if directive == "delete":
            result = [one for one in result if not _has(one, key, item[key])]
        elif directive in (None, "merge"):
            elements.append(item)
        else:
            raise bad_request(f"Unknown patch type found: {directive}")
    for item in elements:
        place = next((at for at, one in enumerate(result) if _has(one, key, item[key])), None)
        if place is None:
            result.append(strategic_merge({}, item, struct))
        else:
            result[place] = strategic_merge(result[place], item, struct)
    return _interleaved(result, elements, have, lambda one: one.get(key) if isinstance(one, dict) else one)


def _in_order(items: list[Any], order: list[Any], before: Any, struct: str, field: str) -> list[Any]:
    key = MERGE_KEYS.get(struct, {}).get(field)
    if key is None:
        return items
    server = before if isinstance(before, list) else []
    return _interleaved(items, order, server, lambda one: one.get(key) if key and isinstance(one, dict) else one)


def _interleaved(
    items: list[Any], order: Sequence[Any], before: Sequence[Any], name: Callable[[Any], Any]
) -> list[Any]:
    """Sort: what ``order`` names as it says, what only the server has where it was before the first that came after it."""
    wanted, server = [name(one) for one in order], [name(one) for one in before]
    patched = sorted((one for one in items if name(one) in wanted), key=lambda one: wanted.index(name(one)))
    kept = [one for one in items if name(one) not in wanted]
    kept.sort(key=lambda one: server.index(name(one)) if name(one) in server else len(server))
    result: list[Any] = []
    while kept and patched:
        left, right = name(kept[0]), name(patched[0])
        goes_first = left in server and right in server and server.index(left) < server.index(right)
        result.append(kept.pop(0) if goes_first else patched.pop(0))
    return [*result, *kept, *patched]


def _has(element: Any, key: str, value: Any) -> bool:
    return isinstance(element, dict) and element.get(key) == value


def _retained(original: Object, patch: Object) -> Object:
    """Return a copy of the original without what ``$retainKeys`` does not name."""
    if _RETAIN_KEYS not in patch:
        return dict(original)
    kept = _list(patch[_RETAIN_KEYS], _RETAIN_KEYS)
    for field in patch:
        if field not in kept and not field.startswith("$") and patch[field] is not None:
            raise bad_request(f"{_RETAIN_KEYS} does not name {field!r}, which the patch sets")
    return {field: value for field, value in original.items() if field in kept}


def _plain(value: Any) -> Any:
    """Return a new value without directives and nulls."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if not key.startswith("$") and item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value if not (isinstance(item, dict) and item.get(_PATCH) == "delete")]
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise bad_request(f"{what} must be a list")
    return value


def _struct_of(struct: str, field: str) -> str:
    type_ = STRUCTS.get(struct, {}).get(field, "")
    return type_.removeprefix("[]").removeprefix("map[string]").removeprefix("v1.")
