"""Plain JSON values: copies and merge patches."""

from __future__ import annotations

from typing import Any


def copy_value(value: Any) -> Any:
    """Return a deep copy of a JSON value; several times faster than `copy.deepcopy`, which must expect cycles."""
    if type(value) is dict:
        return {key: copy_value(item) for key, item in value.items()}
    if type(value) is list:
        return [copy_value(item) for item in value]
    return value


def merge_patch(target: Any, patch: Any) -> Any:
    """Return ``target`` with a JSON merge patch applied (RFC 7386). Unchanged parts are shared, nothing is modified."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def three_way_merge_patch(original: Any, modified: Any, current: Any) -> dict[str, Any]:
    """Return the merge patch that takes ``current`` to ``modified``, and drops what ``original`` had and ``modified`` has not.

    What ``current`` alone has (defaults, allocated fields, status) stays. Lists are replaced whole, as merge patches do.
    """
    patch: dict[str, Any] = {}
    for key, wanted in modified.items():
        have = current.get(key)
        if isinstance(wanted, dict) and isinstance(have, dict):
            earlier = original.get(key) if isinstance(original, dict) else None
            inner = three_way_merge_patch(earlier if isinstance(earlier, dict) else {}, wanted, have)
            if inner:
                patch[key] = inner
        elif wanted is None:
            if key in current:
                patch[key] = None
        elif key not in current or have != wanted:
            patch[key] = wanted
    for key in original or ():
        if key not in modified and key in current:
            patch[key] = None
    return patch
