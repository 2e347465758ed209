"""YAML text to plain values that remember where they were written.

Only data comes out: mappings, lists, text, numbers, booleans and None. Tags that would make anything else are problems,
so nothing in a file is ever executed. Plain scalars mean what they mean to kubectl (YAML 1.1, the rules of go-yaml):
``yes`` is true, ``0644`` is octal, dates and ``22:22`` stay text.

libyaml's events are turned into values here, and not by PyYAML's own constructor, because that keeps no lines and lets
the last of two equal keys win.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from testbed.errors import ManifestError, Problem

# Lines beside a value: its line, and, for a mapping or list, the lines of what is in it.
Lines = tuple[int, "dict[str, Lines] | list[Lines] | None"]
FieldPath = tuple[str | int, ...]
T = TypeVar("T")

#: What a folder's own file is called: `testbed run FOLDER`, `testbed bench run FOLDER`.
SCENARIO_FILE = "scenario.yaml"
BENCHMARK_FILE = "benchmark.yaml"

MAX_ALIAS_NODES = 100_000  # a few hundred bytes of nested aliases could otherwise fill the memory
MAX_DEPTH = 100

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(?:0[bB][01_]+|0[xX][0-9a-fA-F_]+|0[oO]?[0-7_]+|[1-9][0-9_]*|0)")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **{form: True for word in ("true", "yes", "on", "y") for form in (word, word.title(), word.upper())},
    **{form: False for word in ("false", "no", "off", "n") for form in (word, word.title(), word.upper())},
}
_NO_NUMBERS = {
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **{f"{sign}{form}": math.inf for sign in ("", "+") for form in (".inf", ".Inf", ".INF")},
    **{f"-{form}": -math.inf for form in (".inf", ".Inf", ".INF")},
}
_MAX_DIGITS = 1000  # far beyond what a float64 reaches, written in any base


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document: ``value``, and the lines of everything in it."""

    file: str
    value: Any
    lines: Lines

    @property
    def line(self) -> int:
        """The line the document's value starts at."""
        return self.lines[0]

    def line_of(self, path: Sequence[str | int]) -> int:
        """Return the line of a field, or of the nearest thing around it that is there."""
        return line_at(self.lines, path)


def read_text(path: Path) -> tuple[str, list[Problem]]:
    """Return a file's text, or the reason why there is none."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe or device may never end
            return "", [Problem(str(path), 0, "cannot be read: it is not a regular file")]
        return path.read_bytes().decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        return "", [Problem(str(path), error.object.count(b"\n", 0, error.start) + 1, "is not UTF-8 text")]
    except FileNotFoundError:
        return "", [Problem(str(path), 0, "no such file")]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return "", [Problem(str(path), 0, f"cannot be read: {reason[0].lower()}{reason[1:]}")]


def parse_documents(text: str, file: str) -> tuple[list[Document], list[Problem]]:
    """Return the documents of a YAML text in order, without empty ones, and what is wrong with the text.

    After a syntax error nothing more of the text is read; what came before it is still returned.
    """
    composer = _Composer(file)
    collects = gc.isenabled()
    gc.disable()  # nothing here is garbage, and searching for some takes a third of the time of a large file
    try:
        loader = _Loader(text)
        try:
            while loader.check_event():
                composer.take(loader.get_event())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = error.problem or "cannot be read"
        if error.context:
            begin = error.context_mark
            start = f" that begins in line {begin.line + 1}" if begin and mark and begin.line != mark.line else ""
            reason = f"{error.context}{start}, {reason}"
        composer.refuse(mark.line + 1 if mark else 0, f"YAML syntax: {reason}")
    except yaml.reader.ReaderError as error:
        # libyaml counts bytes
        line = text.encode("utf-8", "replace").count(b"\n", 0, max(error.position, 0)) + 1
        composer.refuse(line, f"YAML syntax: {error.reason}")
    except _TooMuch as error:
        composer.refuse(error.line, error.message)
    finally:
        if collects:
            gc.enable()
    return composer.documents, composer.problems


def load_one(path: Path, noun: str, read: Callable[[Document], tuple[T | None, list[Problem]]]) -> T:
    """Return what ``read`` makes of the only document of a file.

    Args:
        noun: what the file is, for messages.
        read: returns a value, or None, and everything wrong with the document; warnings do not count.

    Raises:
        ManifestError: every problem of the file.
    """
    text, problems = read_text(path)
    documents, syntax = parse_documents(text, str(path))
    problems += syntax
    if len(documents) > 1:
        problems.append(Problem(str(path), documents[1].line, f"a {noun} file holds one document"))
    if not documents and not problems:
        problems.append(Problem(str(path), 0, "is empty"))
    value = None
    if documents:
        value, found = read(documents[0])
        problems += found
    if value is None or any(not problem.warning for problem in problems):
        raise ManifestError(problems)
    return value


class _TooMuch(Exception):
    """The text grows beyond what anybody writes: reading stops."""

    def __init__(self, line: int, message: str) -> None:
        self.line = line
        self.message = message


@dataclass(slots=True)
class _Anchored:
    value: Any
    lines: Lines
    nodes: int


@dataclass(slots=True)
class _Open:
    """A mapping or list whose end has not been read yet."""

    value: Any
    inner: Any
    line: int
    anchor: str | None
    nodes_before: int
    key: str | None = None  # of a mapping: the key whose value comes next
    key_line: int = 0
    is_merge: bool = False
    merged: list[tuple[Any, Any]] = field(default_factory=list)


class _Composer:
    """Builds values from YAML events, without recursion."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.documents: list[Document] = []
        self.problems: list[Problem] = []
        self._stack: list[_Open] = []
        self._anchors: dict[str, _Anchored | None] = {}  # None while the anchored thing is still open
        self._nodes = 0
        self._alias_nodes = 0
        self._steps = {
            yaml.ScalarEvent: self._scalar,
            yaml.MappingStartEvent: self._open_mapping,
            yaml.SequenceStartEvent: self._open_list,
            yaml.MappingEndEvent: self._close,
            yaml.SequenceEndEvent: self._close,
            yaml.AliasEvent: self._alias,
            yaml.DocumentStartEvent: self._start_document,
        }

    def refuse(self, line: int, message: str) -> None:
        self.problems.append(Problem(self.file, line, message))

    def take(self, event: Any) -> None:
        step = self._steps.get(type(event))
        if step is not None:
            step(event)

    def _start_document(self, event: Any) -> None:
        self._anchors = {}  # anchors end with their document

    def _scalar(self, event: Any) -> None:
        line = event.start_mark.line + 1
        frame = self._stack[-1] if self._stack else None
        if frame is not None and frame.key is None and isinstance(frame.value, dict):
            self._key(frame, event.value, line, is_plain=event.implicit[0])
            return
        self._nodes += 1
        value = self._scalar_value(event, line)
        if event.anchor:
            self._anchors[event.anchor] = _Anchored(value, (line, None), 1)
        self._put(value, (line, None))

    def _scalar_value(self, event: Any, line: int) -> Any:
        text: str = event.value
        tag = event.tag
        if tag in (None, "!"):
            return self._plain(text, line) if event.implicit[0] and tag is None else text
        if tag in (f"{_TAG}str", f"{_TAG}binary"):
            return text
        if tag in (f"{_TAG}int", f"{_TAG}float", f"{_TAG}bool", f"{_TAG}null"):
            return self._plain(text, line)
        self.refuse(line, f"YAML tag {_shown_tag(tag)} is not supported")
        return text

    def _plain(self, text: str, line: int) -> Any:
        value = plain_value(text)
        if isinstance(value, float) and not math.isfinite(value):
            go_name = "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
            shown = text if len(text) <= 20 else f"{text[:20]}… ({len(text)} characters)"
            self.refuse(
                line, f"{shown} is no number that JSON has (json: unsupported value: {go_name}); for text, quote it"
            )
            return None
        return value

    def _key(self, frame: _Open, text: str, line: int, *, is_plain: bool) -> None:
        if text == "<<" and is_plain:
            frame.key, frame.key_line, frame.is_merge = text, line, True
            return
        if text in frame.value:
            self.refuse(line, f'duplicate key "{_printable(text)}" (first in line {frame.inner[text][0]})')
        frame.key, frame.key_line = text, line

    def _open_mapping(self, event: Any) -> None:
        self._open(event, {}, {})

    def _open_list(self, event: Any) -> None:
        self._open(event, [], [])

    def _open(self, event: Any, value: Any, inner: Any) -> None:
        line = event.start_mark.line + 1
        if len(self._stack) >= MAX_DEPTH:
            raise _TooMuch(line, f"nested deeper than {MAX_DEPTH} levels")
        if event.tag not in (None, "!", f"{_TAG}map", f"{_TAG}seq"):
            self.refuse(line, f"YAML tag {_shown_tag(event.tag)} is not supported")
        if self._stack and self._stack[-1].key is None and isinstance(self._stack[-1].value, dict):
            raise _TooMuch(line, "a mapping or list cannot be a key")
        self._nodes += 1
        if event.anchor:
            self._anchors[event.anchor] = None
        self._stack.append(_Open(value, inner, line, event.anchor, self._nodes))

    def _close(self, event: Any) -> None:
        frame = self._stack.pop()
        for mapping, lines in frame.merged:
            for key, value in mapping.items():
                if key not in frame.value:
                    frame.value[key], frame.inner[key] = value, lines[key]
        lines = (frame.line, frame.inner)
        if frame.anchor:
            self._anchors[frame.anchor] = _Anchored(frame.value, lines, self._nodes - frame.nodes_before + 1)
        self._put(frame.value, lines)

    def _alias(self, event: Any) -> None:
        line = event.start_mark.line + 1
        if event.anchor not in self._anchors:
            raise _TooMuch(line, f"YAML syntax: no anchor &{event.anchor} before this alias")
        anchored = self._anchors[event.anchor]
        if anchored is None:
            raise _TooMuch(line, f"YAML syntax: anchor &{event.anchor} contains itself")
        frame = self._stack[-1] if self._stack else None
        if frame is not None and frame.key is None and isinstance(frame.value, dict):
            if anchored.lines[1] is not None:
                raise _TooMuch(line, "a mapping or list cannot be a key")
            self._key(frame, str(anchored.value), line, is_plain=False)
            return
        self._nodes += anchored.nodes
        self._alias_nodes += anchored.nodes
        if self._alias_nodes > MAX_ALIAS_NODES:
            raise _TooMuch(line, f"aliases stand for more than {MAX_ALIAS_NODES} values")
        # A copy: whoever changes one place must not change the other.
        self._put(_copy(anchored.value), (line, anchored.lines[1]))

    def _put(self, value: Any, lines: Lines) -> None:
        if not self._stack:
            if value is not None:
                self.documents.append(Document(self.file, value, lines))
            return
        frame = self._stack[-1]
        if isinstance(frame.value, list):
            frame.value.append(value)
            frame.inner.append(lines)
            return
        key, frame.key = frame.key, None
        if frame.is_merge:
            frame.is_merge = False
            self._merge(frame, value, lines)
            return
        # The line of a field is that of its key, also when its value starts further down.
        frame.value[key] = value
        frame.inner[key] = (frame.key_line, lines[1])

    def _merge(self, frame: _Open, value: Any, lines: Lines) -> None:
        inner: Any = lines[1]
        sources = list(zip(value, inner, strict=True)) if isinstance(value, list) else [(value, lines)]
        for source, source_lines in sources:
            if isinstance(source, dict):
                frame.merged.append((source, source_lines[1]))
            else:
                self.refuse(frame.key_line, "a merge key << wants a mapping or a list of mappings")


def plain_value(text: str) -> Any:
    """Return what an unquoted scalar means: None, a boolean, a number (not always a finite one), or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    first = text[0]
    if not (first.isdigit() or first in "+-."):
        return text
    if text in _NO_NUMBERS:
        return _NO_NUMBERS[text]
    if _INT.fullmatch(text):
        if len(text) > _MAX_DIGITS:
            return -math.inf if first == "-" else math.inf
        digits = text.replace("_", "").lower()
        sign = -1 if digits[0] == "-" else 1
        digits = digits.lstrip("+-")
        if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
            digits = f"0o{digits}"
        try:
            return sign * int(digits, 0)
        except ValueError:
            return text
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copy(inner) for inner in value]
    return value


def _shown_tag(tag: str) -> str:
    return f"!!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else _printable(tag)


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]


def line_at(lines: Lines, path: Sequence[str | int]) -> int:
    """Return the line of a field, or of the nearest thing around it that is there."""
    found = lines
    for step in path:
        inner = found[1]
        if isinstance(inner, dict) and step in inner:
            found = inner[str(step)]
        elif isinstance(inner, list) and isinstance(step, int) and step < len(inner):
            found = inner[step]
        else:
            break
    return found[0]


def find_line(lines: Lines, field_path: str) -> int:
    """Return the line of a field, as `lines_at`."""
    return lines_at(lines, field_path)[0]


def lines_at(lines: Lines, field_path: str) -> Lines:
    """Return the lines of a field written as Kubernetes does, ``spec.ports[0].nodePort``, or of the nearest thing around it.

    Keys may hold dots (``metadata.labels.app.kubernetes.io/name``): of the keys that are there, the longest fitting one is taken.
    """
    found, rest = lines, field_path
    while rest:
        inner = found[1]
        index = re.match(r"\[([^\]]*)\]\.?", rest)
        if isinstance(inner, list) and index and index[1].isdigit() and int(index[1]) < len(inner):
            found, rest = inner[int(index[1])], rest[index.end() :]
        elif isinstance(inner, dict) and index and index[1] in inner:
            found, rest = inner[index[1]], rest[index.end() :]
        elif isinstance(inner, dict):
            fitting = [key for key in inner if rest.startswith(key) and rest[len(key) : len(key) + 1] in ("", ".", "[")]
            if not fitting:
                break
            key = max(fitting, key=len)
            found, rest = inner[key], rest[len(key) :].removeprefix(".")
        else:
            break
    return found
