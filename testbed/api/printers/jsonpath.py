"""The part of JSONPath that printer columns use: ``.a.b``, ``['a']``, ``[0]``, ``[*]``, ``..a``, ``[?(@.type=="Ready")]``."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

_STEP = re.compile(
    r"""\.\.(?P<deep>[\w-]+)
      | \.(?P<field>(?:\\.|[^.\[\]\\])+)
      | \[(?P<index>-?\d+)\]
      | \[(?P<all>\*)\]
      | \['(?P<quoted>[^']+)'\]
      | \[\?\(\s*@(?P<test>(?:\.[\w/-]+)+)\s*(?P<operator>==|!=)\s*(?P<quote>["'])(?P<value>.*?)(?P=quote)\s*\)\]
    """,
    re.VERBOSE,
)


class _Step(NamedTuple):
    kind: str
    name: str
    operator: str = ""
    value: str = ""


@lru_cache(maxsize=512)
def _steps(path: str) -> tuple[_Step, ...]:
    text = path.strip().removeprefix("{").removesuffix("}").removeprefix("$")
    steps, at = [], 0
    while at < len(text):
        found = _STEP.match(text, at)
        if found is None:
            return (_Step("nothing", ""),)
        at = found.end()
        if found["test"]:
            steps.append(_Step("test", found["test"], found["operator"], found["value"]))
        elif found["field"] is not None:
            name = re.sub(r"\\(.)", r"\1", found["field"])
            steps.append(_Step("all", "") if name == "*" else _Step("field", name))
        else:
            kind = next(kind for kind in ("deep", "index", "all", "quoted") if found[kind] is not None)
            steps.append(_Step("field" if kind == "quoted" else kind, found[kind]))
    return tuple(steps)


def find_path(value: Any, path: str) -> list[Any]:
    """Return everything that a path leads to, in order; nothing for a path that leads nowhere or makes no sense."""
    found = [value]
    for step in _steps(path):
        found = [inner for one in found for inner in _follow(one, step)]
    return [one for one in found if one is not None]


def _follow(value: Any, step: _Step) -> list[Any]:
    match step.kind:
        case "field":
            return [value[step.name]] if isinstance(value, dict) and step.name in value else []
        case "index":
            at = int(step.name)
            return [value[at]] if isinstance(value, list) and -len(value) <= at < len(value) else []
        case "all":
            return list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list) else []
        case "test":
            items = value if isinstance(value, list) else []
            return [one for one in items if _holds(one, step)]
        case "deep":
            return list(_deep(value, step.name))
    return []


def _holds(value: Any, step: _Step) -> bool:
    found = [value]
    for name in step.name.strip(".").split("."):
        found = [one[name] for one in found if isinstance(one, dict) and name in one]
    equal = bool(found) and str(found[0]) == step.value
    return equal if step.operator == "==" else bool(found) and not equal


def _deep(value: Any, name: str) -> list[Any]:
    inner = list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list) else []
    own = [value[name]] if isinstance(value, dict) and name in value else []
    return [*own, *(found for one in inner for found in _deep(one, name))]
