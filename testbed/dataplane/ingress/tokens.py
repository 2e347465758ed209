"""Reads nginx.conf back: words, directives, blocks. Pure; the same rules as ngx_conf_file.c, ngx_conf_read_token.

The webhook uses it to see that what it would write can be read; tests use it to see that no text of a user has become a
directive.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_BLANKS = re.compile(r"[ \t\r\n]+")
_PLAIN = re.compile(r"[^ \t\r\n;{$\\]+")
_PLAIN_QUOTED = re.compile(r"[^\"'\\\n]+")


class SyntaxProblem(ValueError):
    """The text is no nginx configuration; the message holds the line."""


@dataclass(slots=True)
class Directive:
    """A directive: its words, and for a block what is in it."""

    words: tuple[str, ...]
    line: int
    block: list[Directive] | None = None

    @property
    def name(self) -> str:
        return self.words[0]

    def walk(self) -> Iterator[Directive]:
        """Give this directive and all below it."""
        yield self
        for one in self.block or ():
            yield from one.walk()


@dataclass(slots=True)
class _Open:
    directives: list[Directive] = field(default_factory=list)
    line: int = 0


def parse(text: str) -> list[Directive]:
    """Return the directives of a file.

    Raises:
        SyntaxProblem: a word, directive or block does not end.
    """
    stack = [_Open()]
    words: list[str] = []
    line_of_first = 0
    for kind, word, line in _tokens(text):
        if kind == "word":
            line_of_first = line_of_first if words else line
            words.append(word)
        elif kind == ";":
            if not words:
                raise SyntaxProblem(f"line {line}: unexpected ';'")
            stack[-1].directives.append(Directive(tuple(words), line_of_first))
            words = []
        elif kind == "{":
            if not words:
                raise SyntaxProblem(f"line {line}: unexpected '{{'")
            made = Directive(tuple(words), line_of_first, [])
            stack[-1].directives.append(made)
            assert made.block is not None
            stack.append(_Open(made.block, line))
            words = []
        else:
            if words or len(stack) == 1:
                raise SyntaxProblem(f"line {line}: unexpected '}}'")
            stack.pop()
    if words:
        raise SyntaxProblem(f"line {line_of_first}: {words[0]!r} does not end with ';'")
    if len(stack) > 1:
        raise SyntaxProblem(f"line {stack[-1].line}: a block does not end")
    return stack[0].directives


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """Give kind ('word', ';', '{', '}'), text without quotes, and line of each token."""
    at, line, end = 0, 1, len(text)
    while at < end:
        char = text[at]
        blanks = _BLANKS.match(text, at)
        if blanks:
            line += blanks[0].count("\n")
            at = blanks.end()
        elif char == "#":
            at = text.find("\n", at)
            at = end if at < 0 else at
        elif char in ";{}":
            yield char, char, line
            at += 1
        else:
            first = line
            word, at, line = _quoted(text, at, line) if char in "\"'" else _bare(text, at, line)
            yield "word", word, first


def _quoted(text: str, at: int, line: int) -> tuple[str, int, int]:
    quote, first, found = text[at], line, []
    at += 1
    while at < len(text) and text[at] != quote:
        plain = _PLAIN_QUOTED.match(text, at)
        if plain:
            found.append(plain[0])
            at = plain.end()
            continue
        if text[at] == "\\" and at + 1 < len(text):
            following = text[at + 1]
            escaped = {"t": "\t", "r": "\r", "n": "\n"}.get(following, following if following in "\"'\\" else None)
            found.append("\\" + following if escaped is None else escaped)
            line += following == "\n"
            at += 2
            continue
        line += text[at] == "\n"
        found.append(text[at])
        at += 1
    if at >= len(text):
        raise SyntaxProblem(f"line {first}: a quoted word does not end")
    if at + 1 < len(text) and text[at + 1] not in " \t\r\n;{)":
        raise SyntaxProblem(f"line {line}: unexpected {text[at + 1]!r} after a quoted word")
    return "".join(found), at + 1, line


def _bare(text: str, at: int, line: int) -> tuple[str, int, int]:
    found = []
    while at < len(text):
        plain = _PLAIN.match(text, at)
        if plain:
            found.append(plain[0])
            at = plain.end()
            continue
        char = text[at]
        if char == "$" and text[at + 1 : at + 2] == "{":  # a variable's brace opens no block
            closing = text.find("}", at)
            closing = len(text) - 1 if closing < 0 else closing
            found.append(text[at : closing + 1])
            at = closing + 1
            continue
        if char in " \t\r\n;{":
            break
        if char == "\\" and at + 1 < len(text):
            found.append(text[at : at + 2])
            line += text[at + 1] == "\n"
            at += 2
            continue
        found.append(char)
        at += 1
    return "".join(found), at, line
