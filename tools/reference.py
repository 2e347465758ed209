"""Write the reference of our file formats and commands into docs/: what is between the markers.

The fields come from the JSON Schemas, the commands from click.

    python tools/reference.py          # write
    python tools/reference.py --check  # only say which page is out of date; exit status 1 when one is

What is said of a field is in the Structs of testbed/manifests (`described`), what is said of an option in testbed/cli; the
rest of the pages is written by people.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from testbed.cli.main import cli
from testbed.manifests import benchmark_schema, scenario_schema, topology_schema

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN = "<!-- {kind}: tools/reference.py writes what follows -->"
END = "<!-- end of what is written -->"
_HEADER = "| field | type | default | meaning |\n|---|---|---|---|"

Schema = Mapping[str, Any]


class Reference:
    """The sections of one format, in the order in which a reader of a file meets them."""

    def __init__(self, schema: Schema) -> None:
        self._structs: Schema = schema["$defs"]
        self._paths: dict[str, str] = {}  # of Structs, by name: where in a file they are
        self._find(_struct_of(schema), "")
        self._examples: dict[str, list[Any]] = {}  # of Structs, by name: list items that hold one

    def text(self) -> str:
        """Return all sections."""
        return "\n\n".join(self._section(name, path) for name, path in self._paths.items())

    def _find(self, name: str, path: str) -> None:
        if name in self._paths:
            return
        self._paths[name] = path
        for field, schema in self._structs[name]["properties"].items():
            for inner, suffix in _structs_in(schema):
                self._find(inner, f"{path}.{field}{suffix}".removeprefix("."))

    def _section(self, name: str, path: str) -> str:
        struct = self._structs[name]
        is_choice = "oneOf" in struct  # one field of several: an example of a field is a whole item
        rows, items = [], list(self._examples.get(name, ()))
        for field, schema in struct["properties"].items():
            rows.append(self._row(field, schema, field in struct.get("required", ()), is_choice))
            if is_choice:
                inner = next((found for found, _ in _structs_in(schema)), None)
                examples = [{field: example} for example in schema.get("examples", ())]
                if inner is None:
                    items += examples
                else:
                    self._examples[inner] = examples
        parts = [f"### {_heading(path)}", struct["description"]]
        if rows:
            parts.append("\n".join([_HEADER, *rows]))
        if items:
            parts.append("\n".join(["```yaml", *map(_item, items), "```"]))
        return "\n\n".join(parts)

    def _row(self, field: str, schema: Schema, is_required: bool, is_choice: bool) -> str:
        meaning, _, in_words = schema.get("description", "").partition("; default: ")
        if not meaning:
            raise SystemExit(f"{field} has no description: see `described` in testbed/manifests/decode.py")
        if schema.get("examples") and not is_choice and "title" not in schema:
            meaning += "; for example " + ", ".join(f"`{_flow(example)}`" for example in schema["examples"])
        default = "**required**" if is_required else in_words or _value(schema.get("default"))
        cells = (f"`{field}`", self._type(schema), default, meaning)
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    def _type(self, schema: Schema) -> str:
        if "$ref" in schema:
            heading = _heading(self._paths[_struct_of(schema)])
            return f"[{heading}](#{anchor(heading)})"
        if "anyOf" in schema:
            return " or ".join(dict.fromkeys(self._type(branch) for branch in schema["anyOf"]))
        if "enum" in schema:
            return ", ".join(f"`{value}`" if value else '`""`' for value in schema["enum"])
        if schema["type"] == "array":
            items = self._type(schema["items"])
            return (
                f"list of {items}"
                if not items.startswith("list")
                else "list of lists of " + items.removeprefix("list of ")
            )
        if schema["type"] == "object":
            return f"mapping to {self._type(schema['additionalProperties'])}"
        if schema["type"] in ("integer", "number"):
            return {"integer": "whole number", "number": "number"}[schema["type"]] + _bounds(schema)
        if "title" not in schema:
            return {"string": "text", "boolean": "true or false"}[schema["type"]]
        examples = ", ".join(f"`{example}`" for example in schema.get("examples", ()))
        longest = f", at most {schema['maxLength']} characters" if "maxLength" in schema else ""
        return schema["title"] + longest + (f": {examples}" if examples else "")


def _struct_of(schema: Schema) -> str:
    return str(schema["$ref"].rpartition("/")[2])


def _structs_in(schema: Schema) -> Iterator[tuple[str, str]]:
    """Yield the Structs that a field holds, with what follows the field's name in their path."""
    if "$ref" in schema:
        yield _struct_of(schema), ""
    for branch in schema.get("anyOf", ()):
        yield from _structs_in(branch)
    if "$ref" in schema.get("items", {}):
        yield _struct_of(schema["items"]), "[]"


def _heading(path: str) -> str:
    return path or "The file"


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _bounds(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f", {low} to {high}"
    return f", at least {low}" if low is not None else ""


def _value(value: Any) -> str:
    return "–" if value is None else "none" if value in ([], {}) else f"`{_flow(value)}`"


def _flow(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def _item(value: Any) -> str:
    ((field, inner),) = value.items()
    text = yaml.safe_dump(inner, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True)
    return f"- {field}: {text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}"


def commands_text() -> str:
    """Return a section for each command of the command line, in the order of its help."""
    return "\n\n".join(_command(command, path) for path, command in _commands(cli, ("testbed",)))


def _commands(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in sorted(group.commands.items()):
        if command.hidden:
            continue
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


def _command(command: click.Command, path: tuple[str, ...]) -> str:
    context = click.Context(command, info_name=" ".join(path))
    usage = (
        " ".join([*path, *command.collect_usage_pieces(context)]).replace("[OPTIONS] ", "").replace(" [OPTIONS]", "")
    )
    parts = [f"## {' '.join(path)}", f"```\n{usage}\n```", " ".join((command.help or "").split())]
    rows = [_option(option) for option in command.params if isinstance(option, click.Option) and not option.hidden]
    if rows:
        parts.append("\n".join(["| option | meaning |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _option(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = "" if option.is_flag else option.metavar or "VALUE"
    if isinstance(option.type, click.Choice):
        value = " or ".join(option.type.choices)
    meaning = (option.help or "") + (
        f" Default: `{option.default}`." if isinstance(option.default, str) and option.default else ""
    )
    return f"| {names}{' ' + value if value else ''} | {meaning.replace('|', chr(92) + '|')} |"


PAGES: Mapping[str, tuple[Path, Callable[[], str]]] = {
    "fields of a topology": (DOCS / "topology.md", lambda: Reference(topology_schema()).text()),
    "fields of a scenario": (DOCS / "scenario.md", lambda: Reference(scenario_schema()).text()),
    "fields of a benchmark": (DOCS / "benchmarks.md", lambda: Reference(benchmark_schema()).text()),
    "commands": (DOCS / "commands.md", commands_text),
}


def render(kind: str) -> str:
    """Return a page as it should be: what people wrote, and what comes between the markers."""
    path, text = PAGES[kind]
    before, begin, rest = path.read_text().partition(BEGIN.format(kind=kind))
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path}: the markers are missing: {BEGIN.format(kind=kind)} and {END}")
    return f"{before}{begin}\n\n{text()}\n\n{end}{after}"


def main() -> int:
    """Write the pages, or say which are out of date."""
    stale = [kind for kind, (path, _) in PAGES.items() if path.read_text() != render(kind)]
    for kind in stale:
        print(PAGES[kind][0])
        if "--check" not in sys.argv:
            PAGES[kind][0].write_text(render(kind))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
