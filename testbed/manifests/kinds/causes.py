"""Field problems in Kubernetes' words. `Causes` collects them; the helpers print values as Go does.

Source: kubernetes apimachinery/pkg/util/validation/field/errors.go (v1.30).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from testbed.errors import Cause

_ESCAPES = {
    "\a": "\\a",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
    "\v": "\\v",
    '"': '\\"',
    "\\": "\\\\",
}


class GoText(str):
    """Text that already looks as Go prints the value."""

    __slots__ = ()


def go_quote(text: str) -> str:
    """Return a string as Go's %q prints it."""
    return '"' + "".join(_quoted_char(char) for char in text) + '"'


def _quoted_char(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char.isprintable():
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def go_value(value: Any) -> str:
    """Return a value as field errors print it: strings quoted, numbers bare, lists and maps in Go's syntax."""
    if isinstance(value, GoText):
        return str(value)
    if isinstance(value, str):
        return go_quote(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return go_map(value)
    if isinstance(value, (list, tuple)):
        return "[]string{" + ", ".join(go_quote(str(item)) for item in value) + "}"
    return str(value)


def go_map(value: Mapping[str, str] | None) -> str:
    """Return a map[string]string as Go's %#v prints it."""
    if value is None:
        return "map[string]string(nil)"
    return "map[string]string{" + ", ".join(f"{go_quote(key)}:{go_quote(value[key])}" for key in sorted(value)) + "}"


class Causes(list[Cause]):
    """The problems found so far, in the order of the checks."""

    def required(self, field: str, detail: str = "") -> None:
        self.append(Cause(field, "Required value" + (f": {detail}" if detail else ""), "FieldValueRequired"))

    def invalid(self, field: str, value: Any, detail: str) -> None:
        self.append(Cause(field, f"Invalid value: {go_value(value)}: {detail}", "FieldValueInvalid"))

    def invalid_each(self, field: str, value: Any, details: Iterable[str]) -> None:
        for detail in details:
            self.invalid(field, value, detail)

    def forbidden(self, field: str, detail: str) -> None:
        self.append(Cause(field, f"Forbidden: {detail}", "FieldValueForbidden"))

    def duplicate(self, field: str, value: Any) -> None:
        self.append(Cause(field, f"Duplicate value: {go_value(value)}", "FieldValueDuplicate"))

    def not_found(self, field: str, value: Any) -> None:
        self.append(Cause(field, f"Not found: {go_value(value)}", "FieldValueNotFound"))

    def unsupported(self, field: str, value: Any, supported: Sequence[str]) -> None:
        choice = ", ".join(go_quote(item) for item in supported)
        self.append(
            Cause(field, f"Unsupported value: {go_value(value)}: supported values: {choice}", "FieldValueNotSupported")
        )

    def too_long(self, field: str, limit: int) -> None:
        self.append(Cause(field, f"Too long: must have at most {limit} bytes", "FieldValueTooLong"))

    def too_many(self, field: str, actual: int, limit: int) -> None:
        self.append(Cause(field, f"Too many: {actual}: must have at most {limit} items", "FieldValueTooMany"))

    def one_of(self, field: str, value: str | None, supported: Sequence[str], *, needed: bool = True) -> None:
        """Check a closed set; the empty value is a problem of its own when it is needed."""
        if not value:
            if needed:
                self.required(field)
        elif value not in supported:
            self.unsupported(field, value, supported)
