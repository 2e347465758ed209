"""docs/troubleshooting.md: each text that it quotes is one that the program prints; what needs no lab is provoked."""

from __future__ import annotations

import ast
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

import testbed.cli.run
import testbed.lab.folder
import testbed.lab.start
from testbed.cli.main import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
FILES = ROOT / "tests" / "unit" / "files" / "troubleshooting"
BLOCKS = re.findall(r"(?:<!-- (provoked(?: by a user)?) -->\n)?^```\n(.*?)\n^```$", PAGE, re.DOTALL | re.MULTILINE)
QUOTED = [line for how, text in BLOCKS if not how for line in text.splitlines()]
COMMANDS = [
    pytest.param(how, *found, id=found[0])
    for how, text in BLOCKS if how
    for found in re.findall(r"\$ (testbed [^\n]*)\n((?:(?!\$ ).*(?:\n|$))+)", text)
]  # fmt: skip


#: A text of the source: its fixed parts, in order; values come between them.
Template = tuple[str, ...]


@cache
def sources() -> dict[Path, str]:
    return {path: path.read_text() for path in (ROOT / "testbed").rglob("*.py")}


@cache
def templates(path: Path) -> frozenset[Template]:
    """Return every text of a file that has a word or more to say."""
    found = set()
    for node in ast.walk(ast.parse(sources()[path])):
        if isinstance(node, ast.JoinedStr):
            found.add(tuple(str(part.value) for part in node.values if isinstance(part, ast.Constant)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add((node.value,))
    return frozenset(template for template in found if sum(map(len, template)) >= 12)


def holds(text: str, template: Template) -> bool:
    """Say whether the fixed parts are in the text, in their order."""
    place = 0
    for part in template:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def is_printed(text: str) -> bool:
    """Say whether a quoted text can be one of the source's: two thirds of its own characters, or more, are fixed there."""
    own = len(text.replace("…", ""))
    words = re.findall(r"[A-Za-z]{4,}", text)
    for path, source in sources().items():
        if sum(word in source for word in words) >= len(words) * 0.8 and any(
            sum(map(len, template)) >= own * 2 / 3 and holds(text, template) for template in templates(path)
        ):
            return True
    return False


@pytest.mark.parametrize("text", QUOTED)
def test_a_quoted_text_is_printed(text: str) -> None:
    """It is still in the source, word by word."""
    assert is_printed(text)


def test_a_text_that_is_not_printed_is_found() -> None:
    """Another word, or a text of which only a small part is ours."""
    assert is_printed("several labs are running (a, b); name one")
    assert not is_printed("several labs are at work (a, b); name one")
    assert not is_printed("there is no luck in this lab, whatever you may have heard people say of it")


@pytest.mark.parametrize(("how", "command", "printed"), COMMANDS)
def test_a_provoked_text_is_printed(
    how: str,
    command: str,
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command, typed in a folder with the files that it names, prints this and starts nothing."""

    def started(*_: object, **__: object) -> NoReturn:
        pytest.fail("a lab was started")

    monkeypatch.chdir(FILES)
    monkeypatch.setattr(testbed.lab.folder, "state_root", lambda: tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000 if how.endswith("by a user") else 0)
    monkeypatch.setattr(testbed.lab.start, "_TOOLS", {})
    monkeypatch.setattr(testbed.lab.start, "start_lab", started)
    monkeypatch.setattr(testbed.cli.run, "start_lab", started)
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit):
        main()
    out, err = capsys.readouterr()
    assert (err + out).strip() == printed.strip()


def test_there_is_something_to_check() -> None:
    """Blocks were found, of both kinds."""
    assert len(QUOTED) > 50
    assert len(COMMANDS) > 12
