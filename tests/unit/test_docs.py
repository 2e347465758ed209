"""What people read is true as far as a program can tell: links lead somewhere, commands parse, files validate."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import yaml

from testbed.cli.main import cli
from testbed.manifests import check_files

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in (
        *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("scenarios/**/*.md"), *ROOT.glob("tests/**/*.md"),
    )
)  # fmt: skip
WEB = ROOT / "tests" / "unit" / "files" / "docs-web.yaml"


class Block(NamedTuple):
    """A fenced block of a page; ``line`` is that of its first line."""

    page: Path
    line: int
    language: str
    text: str


@cache
def read(page: Path) -> tuple[str, tuple[Block, ...]]:
    """Return a page without its fenced blocks (their lines are empty), and the blocks."""
    prose: list[str] = []
    blocks: list[Block] = []
    inside: list[str] | None = None
    language = ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            if inside is None:
                inside, language = [], line.strip().removeprefix("```")
            else:
                blocks.append(Block(page, number - len(inside), language, "\n".join(inside)))
                inside = None
            prose.append("")
        elif inside is not None:
            inside.append(line)
            prose.append("")
        else:
            prose.append(line)
    assert inside is None, f"{page}: a block does not end"
    return "\n".join(prose), tuple(blocks)


def shown(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ── links ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#+ +(.*?) *$", read(page)[0]):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (slug if not number else f"{slug}-{number}") in found:
            number += 1
        found.add(slug if not number else f"{slug}-{number}")
    return found


def links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", read(page)[0])):
        if not re.match(r"[a-z]+:", target):
            yield target


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in links(page):
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        if not there.exists():
            broken.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(there):
            broken.append(f"{target}: no such heading")
    return broken


def test_links_lead_somewhere() -> None:
    """Every relative link's file is there, with the heading that it names."""
    broken = {shown(page): found for page in PAGES if (found := broken_links(page))}
    assert not broken
    assert sum(len(list(links(page))) for page in PAGES) > 100  # they were found


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """A missing file, and a missing heading; code is no link."""
    page = tmp_path / "page.md"
    page.write_text(
        "# One two\n[a](gone.md) [b](#one-two) [c](page.md#three) `[d](e.md)` [f](https://x.y/z)\n```\n[g](h.md)\n```\n"
    )
    assert broken_links(page) == ["gone.md: no such file", "page.md#three: no such heading"]


#: Words that look like a path of this repository, and are checked to be one. testbed/ may be left out before its folders.
_PATHS = re.compile(
    r"(?<![\w./<-])((?:docs|tests|tools|benchmarks|scenarios|topologies|testbed|adr|kernel|unit|golden|"
    r"dataplane|programs|model|lab|cli|vm|kubelet|probes|underlay|registry|controllers|manifests|scenario|api|capture|bench)"
    r"/[\w./-]*\w\.(?:md|py|yaml|sh|json))"
)


def test_files_that_are_named_are_there() -> None:
    """`tests/unit/test_x.py`, `dataplane/y.py`, `docs/z.md`: a file that is named, linked or not, exists."""
    roots = (ROOT, ROOT / "testbed", ROOT / "docs", ROOT / "tests")
    missing = [
        f"{shown(page)}: {path}"
        for page in PAGES
        for path in _PATHS.findall(page.read_text())
        if page.name != "CHANGELOG.md"
        and not any((root / path).exists() for root in (*roots, page.parent))
        and "NAME" not in path
    ]
    assert not missing


# ── commands ────────────────────────────────────────────────────────────────────────────────────────────────────────

#: Where a shell's own syntax, or a page's explanation, ends a command.
_ENDS = re.compile(r"\s(?:\||\|\||&&|;|>|2>|#|──)\s.*|;.*|\s2?>\S.*|\)\".*|\s{3,}(?![-\[.\s]).*|\s*…$|\s\\$")
_PLACEHOLDER = re.compile(r"…|\.\.\.|[A-Z]{1,12}(?:\|-)?")


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """Yield (where, command) for every `testbed …` and `./dev …` of a page: inline code, and lines of blocks."""
    prose, blocks = read(page)
    for found in re.findall(r"`((?:testbed|\./dev) [^`]*)`", prose.replace("\n", " ")):
        yield shown(page), clean(found)
    for block in blocks:
        if block.language in ("", "sh", "console"):
            for number, line in enumerate(block.text.splitlines(), block.line):
                for match in re.finditer(
                    r"(?:^|^[#$] |[`(]| --? |&& |sudo |^ +|[;:] )((?:testbed|\./dev) [^`]*)", line
                ):
                    if "──▶" not in line:
                        yield f"{shown(page)}:{number}", clean(match[1])


def clean(text: str) -> str:
    return _ENDS.sub("", text.replace("\\|", "|")).strip()


def words_of(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # a quote of what is around it
        return shlex.split(command.rpartition("'")[0])


def alternatives(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield each command of one that is written with `[optional]` and `{this|that}`."""
    plain = [word.strip("[]{}") for word in words if word.strip("[]{}")]
    return (list(chosen) for chosen in product(*(word.split("|") for word in plain)))


def complaint(words: Sequence[str]) -> str:
    """Return what the command line has against these words after `testbed`, or ''. Values in capitals are placeholders."""
    command: click.Command = cli
    context = click.Context(cli, info_name="testbed")
    left = list(words)
    if left[:1] == ["--debug"]:
        left = left[1:]
    while isinstance(command, click.Group):
        if not left or left[0] in ("--help", "--version") or _PLACEHOLDER.fullmatch(left[0]):
            return ""
        if left[0].startswith("-"):
            return f"no command: {left[0]}"
        found = command.get_command(context, left[0])
        if found is None:
            return f"no such command: {left[0]}"
        command, left = found, left[1:]
        context = click.Context(command, parent=context, info_name=command.name, **command.context_settings)
    try:
        given, _, _ = command.make_parser(context).parse_args(args=[word for word in left if word not in ("…", "...")])
    except click.UsageError as error:
        return error.format_message()
    for option in command.params:
        values = given.get(str(option.name))
        for value in values if isinstance(values, list) else [values]:
            if isinstance(option.type, click.Choice) and isinstance(value, str) and not _PLACEHOLDER.fullmatch(value):
                try:
                    option.type.convert(value, option, context)
                except click.UsageError as error:
                    return error.format_message()
    return ""


def test_commands_parse() -> None:
    """Every `testbed …` is a command with options that it has, every `./dev …` one of the script's."""
    verbs = set(re.findall(r"(?m)^  ([a-z-]+)\)", (ROOT / "dev").read_text()))
    wrong, count = [], 0
    for page in PAGES:
        for where, command in commands(page):
            program, *words = words_of(command)
            count += 1
            if program == "./dev":
                wrong += [f"{where}: {command}" for word in words[:1] if word not in verbs and word.isidentifier()]
                continue
            wrong += [f"{where}: {command}: {why}" for chosen in alternatives(words) if (why := complaint(chosen))]
            wrong += [
                f"{where}: {word}: not there"
                for word in words
                if word.startswith("scenarios/") and not list(ROOT.glob(word))
            ]
    assert not wrong
    assert count > 200


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("testbed up --fast", "No such option '--fast'."),
        ("testbed upp", "no such command: upp"),
        (
            "testbed run scenarios/x -o yaml",
            "Invalid value for '-o' / '--output': 'yaml' is not one of 'text', 'json', 'junit'.",
        ),
        (
            "testbed capture all -o json|gif",
            "Invalid value for '-o' / '--output': 'gif' is not one of 'text', 'json', 'mermaid'.",
        ),
        ("testbed proxy explian", "no such command: explian"),
        ("testbed exec node1 -- ls --what-it-likes", ""),
        ("testbed capture [-l LAB] POINT... [-w FILE|-] [-o json|mermaid]", ""),
    ],
)
def test_a_wrong_command_is_found(command: str, why: str) -> None:
    """Options, commands and choices that are not there; what another program takes is its own."""
    found = [complaint(words) for words in alternatives(words_of(clean(command))[1:])]
    assert next((one for one in found if one), "") == why


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("testbed exec node1 -- iptables-save -t nat | grep 30888", "testbed exec node1 -- iptables-save -t nat"),
        ("testbed ls                 # what runs", "testbed ls"),
        ("testbed bench run FILE            a benchmark file", "testbed bench run FILE"),
        ("testbed proxy sync    --cleanup      remove it", "testbed proxy sync    --cleanup"),
        ("testbed exec a -- conntrack -L 2>/dev/null | tail -1", "testbed exec a -- conntrack -L"),
    ],
)
def test_where_a_command_ends(line: str, command: str) -> None:
    """Pipes, redirections, comments and explanations are not ours."""
    assert clean(line) == command


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


_MEASURED = {"throughput", "connections", "latency", "sync"}


def as_file(text: str) -> str:
    """Return a block as a file of ours: a list of steps in a scenario that applies dev/web, measurements in a benchmark."""
    found = next(yaml.safe_load_all(text))
    if not isinstance(found, list):
        return text
    is_steps = not _MEASURED & found[0].keys()
    kind, field, topology = ("Scenario", "steps", "three-nodes") if is_steps else ("Benchmark", "measure", "bench")
    head = f"apiVersion: testbed/v1\nkind: {kind}\nmetadata: {{name: x}}\nspec:\n  topology: {topology}\n  {field}:\n"
    first = "  - apply: web.yaml\n" if is_steps else ""
    return head + first + "".join(f"  {line}\n" for line in text.splitlines())


def test_yaml_is_valid(tmp_path: Path) -> None:
    """Files of ours and manifests validate; so do steps in a scenario that applies dev/web, and measurements in a benchmark."""
    wrong, kinds = {}, set()
    (tmp_path / "web.yaml").write_text(WEB.read_text())
    for block in (block for page in PAGES for block in read(page)[1] if block.language == "yaml"):
        path = tmp_path / "scenario.yaml"
        path.write_text(as_file(block.text))
        kinds.add(next(yaml.safe_load_all(path.read_text()))["kind"])
        if found := [problem.message for problem in check_files([path]) if not problem.warning]:
            wrong[f"{shown(block.page)}:{block.line}"] = found
    assert not wrong
    assert kinds >= {"Topology", "Scenario", "Benchmark"}


# ── what there is ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_page_is_found_from_the_readme() -> None:
    """README names each page of docs/, docs/adr/ by its folder; scenarios/README.md each folder beside it."""
    readme, scenarios = (ROOT / "README.md").read_text(), (ROOT / "scenarios" / "README.md").read_text()
    named = {page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" in readme}
    reached = named | {target for name in named for target in links(ROOT / "docs" / name)}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - reached == set()
    folders = {folder.name for folder in (ROOT / "scenarios").iterdir() if folder.is_dir()}
    assert {folder for folder in folders if not re.search(rf"(?<![\w-]){folder}(?![\w-])", scenarios)} == set()


def test_the_levels_are_those_that_are_checked() -> None:
    """docs/architecture.md has the folders at the levels that import-linter holds them to."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    table = (ROOT / "docs" / "architecture.md").read_text().partition("| level | folder |")[2].partition("\n\n")[0]
    drawn: list[set[str]] = []
    for level, folders in re.findall(r"(?m)^\| ?(\d?) \| ([^|]*) \|", table):
        if level:
            drawn.append(set())
        drawn[-1] |= set(re.findall(r"([a-z_]+)(?:\.py|/)", folders))
    linted = [{name.strip().removeprefix("testbed.") for name in layer.split(":")} for layer in reversed(layers)]
    assert drawn == linted
    there = {entry.parent.name for entry in (ROOT / "testbed").glob("*/__init__.py")}
    there |= {entry.stem for entry in (ROOT / "testbed").glob("*.py") if not entry.name.startswith("__")}
    assert set().union(*drawn) == there
