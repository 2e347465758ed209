"""Whether a program wrote what was expected of it: a status, parts of the text, the form of a table. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from testbed.manifests.scenario import KEPT_PATTERN
from testbed.model.scenario import ExecStep, KubectlStep, Table
from testbed.scenario.judge import Verdict

_SHOWN = 400


def judge_output(
    step: ExecStep | KubectlStep, status: int, output: str, errors: str, kept: Mapping[str, str]
) -> Verdict:  # fmt: skip
    """Return the verdict on one run.

    Args:
        kept: Outputs that earlier steps have kept, by name.
    """
    claims = step.claims
    wanted, missed = [f"status {step.status}"], []
    passed = status == step.status
    if step.prints is not None:
        prints = fill(step.prints, kept)
        wanted.append(f"{prints!r} printed")
        passed = passed and prints in output
    if claims.matches:
        wanted.append(f"a match of {claims.matches!r}")
        passed = passed and re.search(claims.matches, f"{output}\n{errors}", re.MULTILINE) is not None
    if claims.differs:
        wanted.append(f"something other than {kept.get(claims.differs, '')!r}")
        passed = passed and output.strip() != kept.get(claims.differs)
    if claims.table is not None:
        wanted.append(f"a table of {len(claims.table.rows)} rows with the columns {', '.join(claims.table.columns)}")
        missed = table_faults(claims.table, output)
    seen = f"status {status}, printed {_shorten(output)!r}" + (f", said {_shorten(errors)!r}" if errors.strip() else "")
    return Verdict(
        passed=passed and not missed, wanted=", ".join(wanted), seen="; ".join([*missed, seen])
    )  # fmt: skip


def fill(text: str, kept: Mapping[str, str]) -> str:
    """Return a text with {{NAME}} replaced by what was kept under that name."""
    return re.sub(KEPT_PATTERN, lambda match: kept.get(match[1], match[0]), text)


def parse_table(text: str) -> list[tuple[str, ...]]:
    """Return the header and the rows of a table as kubectl prints it: every column begins where its heading does."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return []
    starts = [match.start() for match in re.finditer(r"(?<!\S)\S+(?: \S+)*", lines[0])]
    ends: Sequence[int | None] = [*starts[1:], None]
    return [tuple(line[start:end].strip() for start, end in zip(starts, ends, strict=True)) for line in lines]


def table_faults(wanted: Table, text: str) -> list[str]:
    """Return what a printed table has other than wanted: columns, and rows that no pattern matches or that are missing."""
    header, *rows = parse_table(text) or [()]
    if header != wanted.columns:
        return [f"the columns are {', '.join(header) or 'none'}"]
    left = list(rows)
    faults = []
    for pattern in wanted.rows:
        found = next((row for row in left if all(map(fnmatchcase, row, pattern))), None)
        if found is None:
            faults.append(f"no row is like {' | '.join(pattern)}")
        else:
            left.remove(found)
    return faults + [f"a row too many: {' | '.join(row)}" for row in left]


def _shorten(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
