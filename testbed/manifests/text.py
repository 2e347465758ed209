"""Words for messages about YAML: places, values, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from testbed.manifests.source import FieldPath


def unknown_field(name: str, known: Iterable[str]) -> str:
    """Return the text for a field that does not exist."""
    return f'unknown field "{name if name.isprintable() else repr(name)[1:-1]}"{suggestion(name, known)}'


def suggestion(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return `` (did you mean "x"?)`` for the known name that looks most like this one, or ''."""
    close = closest(name, known, cutoff=cutoff)
    return f' (did you mean "{close}"?)' if close else ""


def closest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return the known name that looks most like this one, or '' when none is like it."""
    by_lower = {text.lower(): text for text in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else ""


def format_path(path: FieldPath) -> str:
    """Return a path as Kubernetes writes it: ``spec.ports[0].nodePort``; odd keys go in brackets."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif step.replace("_", "").replace("-", "").isalnum():
            text += f".{step}" if text else step
        else:
            text += f"[{step if step.isprintable() else repr(step)[1:-1]}]"
    return text


def describe_value(value: Any) -> str:
    """Return a wrong value in words, short enough for a message."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"the boolean {str(value).lower()}"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {value if len(value) <= 60 else value[:60] + '…'!r}"
        case list():
            return "a list"
    return "a mapping"


def unsafe_path(text: str, whose: str) -> str:
    """Return why a path is not one of a file below the folder of a ``whose`` file, or ''."""
    path = PurePosixPath(text)
    if not text or not text.isprintable():
        return f"{text!r} is not a file name"
    if path.is_absolute() or ".." in path.parts:
        return f"{text!r} leaves the {whose}'s folder"
    return ""
