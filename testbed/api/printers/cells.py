"""Cells of tables: how ages, selectors, lists and counts are written.

Source: kubernetes pkg/printers/internalversion/printers.go, apimachinery util/duration (v1.30).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from testbed.model.objects import Object

NONE = "<none>"
UNKNOWN = "<unknown>"
_SHOWN = 3  # of hosts, endpoints, ports


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a Table. ``priority`` 1: only with ``-o wide``."""

    name: str
    type: str = "string"
    format: str = ""
    description: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Printer:
    """The columns of a kind, and the cells of an object; the second argument is the time, in seconds since 1970."""

    columns: tuple[Column, ...]
    cells: Callable[[Object, float], list[Any]]


NAME = Column(
    "Name",
    format="name",
    description="Name must be unique within a namespace. Is required when creating resources, although some resources "
    "may allow a client to request the generation of an appropriate name automatically.",
)
AGE = Column(
    "Age", description="CreationTimestamp is a timestamp representing the server time when this object was created."
)
CONTAINERS = Column("Containers", description="Names of each container in the template.", priority=1)
IMAGES = Column("Images", description="Images referenced by each container in the template.", priority=1)
SELECTOR = Column("Selector", priority=1)


def columns(*names: str | Column) -> tuple[Column, ...]:
    """Return columns: ``!Name`` is wide, ``#Name`` a number, a Column as it is."""
    return tuple(_column(name) if isinstance(name, str) else name for name in names)


def _column(name: str) -> Column:
    bare = name.lstrip("!#")
    return Column(bare, type="integer" if "#" in name else "string", priority=1 if "!" in name else 0)


def name_of(obj: Object) -> str:
    return str(obj["metadata"].get("name", ""))


def spec_of(obj: Object) -> Object:
    return obj.get("spec") or {}


def status_of(obj: Object) -> Object:
    return obj.get("status") or {}


def seconds(timestamp: str) -> float | None:
    """Return an RFC 3339 time as seconds since 1970, or None for what is none."""
    try:
        return datetime.fromisoformat(timestamp).timestamp()
    except (ValueError, TypeError):
        return None


def since(timestamp: str | None, now: float) -> str:
    """Return how long ago a time was: ``7m34s``."""
    at = seconds(timestamp) if timestamp else None
    return UNKNOWN if at is None else duration(now - at)


def age(obj: Object, now: float) -> str:
    return since(obj["metadata"].get("creationTimestamp"), now)


def duration(length_s: float) -> str:
    """Return a duration as people read it, in one or two units."""
    total = int(length_s)
    if total < -1:
        return "<invalid>"
    if total < 0:
        return "0s"
    if total < 120:
        return f"{total}s"
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if minutes < 10:
        return f"{minutes}m{total % 60}s" if total % 60 else f"{minutes}m"
    if hours < 3:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return f"{days}d{hours % 24}h" if hours % 24 else f"{days}d"
    years = days // 365
    if years < 2:
        return f"{days}d"
    if years < 8:
        return f"{years}y{days % 365}d" if days % 365 else f"{years}y"
    return f"{years}y"


def labels_text(labels: Mapping[str, str] | None) -> str:
    """Return labels as ``a=b,c=d``, sorted, or ``<none>``."""
    return ",".join(f"{key}={value}" for key, value in sorted((labels or {}).items())) or NONE


def selector_text(selector: Object | None) -> str:
    """Return a LabelSelector as kubectl's -l would take it; an empty one is ``<none>``."""
    if selector is None:
        return NONE
    terms = [f"{key}={value}" for key, value in sorted((selector.get("matchLabels") or {}).items())]
    for term in sorted(selector.get("matchExpressions") or [], key=lambda one: str(one.get("key", ""))):
        key, values = term.get("key", ""), ",".join(sorted(term.get("values") or []))
        operator = term.get("operator")
        terms.append(
            {
                "In": f"{key} in ({values})",
                "NotIn": f"{key} notin ({values})",
                "Exists": str(key),
                "DoesNotExist": f"!{key}",
            }.get(str(operator), str(key))
        )
    return ",".join(terms) or NONE


def first_few(items: Iterable[str], *, empty: str) -> str:
    """Return the first three, and how many more there are: ``a,b,c + 2 more...``."""
    found = list(items)
    if not found:
        return empty
    more = f" + {len(found) - _SHOWN} more..." if len(found) > _SHOWN else ""
    return ",".join(found[:_SHOWN]) + more


def container_cells(pod_spec: Object) -> list[str]:
    """Return the names and the images of containers."""
    containers: Sequence[Object] = pod_spec.get("containers") or ()
    return [",".join(str(one.get(field, "")) for one in containers) for field in ("name", "image")]


def template_cells(obj: Object) -> list[str]:
    return container_cells(((spec_of(obj).get("template") or {}).get("spec")) or {})
