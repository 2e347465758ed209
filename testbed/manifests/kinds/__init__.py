"""What each kind of object may hold: field names and types, defaults, and rules that need no cluster to check."""

from __future__ import annotations

from testbed.errors import Cause
from testbed.model.json_values import copy_value
from testbed.model.objects import Object


def decode(obj: Object) -> tuple[Object, list[str]]:
    """Return a copy, and what does not fit the types of the kind, in the words of Kubernetes' decoder."""
    return copy_value(obj), []


def default_in_place(obj: Object) -> None:
    """Fill in defaults."""


def validate_decoded(obj: Object) -> list[Cause]:
    """Check a decoded and defaulted object."""
    return []


def validate_status(obj: Object) -> list[Cause]:
    """Check the status of a decoded object."""
    return []


def default_object(obj: Object) -> Object:
    """Return a copy with the defaults filled in."""
    new, _ = decode(obj)
    default_in_place(new)
    return new


def validate_object(obj: Object) -> list[Cause]:
    """Return every problem of an object that can be seen without a cluster."""
    return []


def unknown_fields(obj: Object) -> list[str]:
    """Return the paths of fields that the kind does not have."""
    return []
