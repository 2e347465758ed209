"""What a run of scenarios looks like: lines for people, JSON and JUnit for programs."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from testbed.errors import InputError
from testbed.kernel.files import write_whole
from testbed.scenario.runner import ScenarioResult, Status, StepResult

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_XML_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # XML 1.0, 2.2
_MOST_OUTPUT = 16384
_IN_NESTED = ", in the nested kernel"
_MARKS = {Status.PASSED: ("✓", "32"), Status.FAILED: ("✗", "31"), Status.NOT_RUN: ("-", "2")}


def printable(text: str) -> str:
    """Replace control characters: what a server answered must not move a reader's cursor. Lines stay lines."""
    return _CONTROL.sub("�", text)


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Return rows as a table: columns padded to their widest cell, those in ``right`` on the left, three spaces between."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        sized = enumerate(zip(row, widths, strict=True))
        cells = (cell.rjust(width) if index in right else cell.ljust(width) for index, (cell, width) in sized)
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


class TextReport:
    """Lines as things happen. Colours only when asked for."""

    def __init__(self, *, colours: bool) -> None:
        self._colours = colours

    def _paint(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colours else text

    def heading(self, name: str, mode: str, lab: str, *, nested: bool = False) -> str:
        return self._paint(f"{name}", "1") + f", proxy mode {mode}, lab {lab}" + (_IN_NESTED if nested else "")

    def step(self, result: StepResult, total: int) -> str:
        """Return one line for a step that passed or was not run; what was wanted and seen for one that failed."""
        mark, colour = _MARKS[result.status]
        number = f"{result.number:>{len(str(total))}}/{total}"
        title = _one_line(result.step.title)
        if result.status is Status.NOT_RUN:
            return f"  {self._paint(mark, colour)} {number} {title} (not run)"
        line = f"  {self._paint(mark, colour)} {number} {title:<70} {result.duration_s:6.2f} s"
        if result.status is Status.PASSED:
            return line
        rows = [("wanted", result.wanted), ("seen", result.seen)]
        if result.where:
            rows.append(("where", result.where))
        rows.append(("file", f"{result.step.file}:{result.step.line}"))
        if result.attempts > 1:
            rows.append(("tried", f"{result.attempts} times"))
        if result.captures:
            rows.append(("packets", ", ".join(result.captures)))
        below = "\n" + " " * 14  # the further lines of a value start where its first one does
        shown = (f"{self._paint(f'{name:<7}', '2')} {printable(value)}".replace("\n", below) for name, value in rows)
        return "\n".join([line, *(f"      {row}" for row in shown)])

    def summary(self, results: Sequence[ScenarioResult]) -> str:
        """Return how requests spread over pods, and a table of scenarios."""
        lines = [""]
        for result in results:
            lines += self._spreads(result)
        rows = [("SCENARIO", "MODE", "STEPS", "RESULT", "TIME")]
        for result in results:
            passed = sum(step.status is Status.PASSED for step in result.steps)
            word = "passed" if result.passed else "failed"
            steps = f"{passed}/{len(result.steps)}"
            mode = result.mode + (" (nested)" if result.nested else "")
            rows.append((result.scenario.name, mode, steps, word, f"{result.duration_s:.1f} s"))
        return "\n".join([*lines, aligned(rows), *self._rows(results)])

    def _rows(self, results: Sequence[ScenarioResult]) -> list[str]:
        """Return a table of the rows that steps begin, and how many of them passed; nothing when no step begins any."""
        found = [(result, row) for result in results for row in rows_of(result)]
        if not found:
            return []
        cells = [("ROW", "MODE", "SCENARIO", "RESULT", "TIME")]
        for result, row in found:
            cells.append(
                (_one_line(row.title), result.mode, result.scenario.name, row.status.value, f"{row.duration_s:.1f} s")
            )
        titles = {row.title for _, row in found}
        failed = {row.title for _, row in found if row.status is not Status.PASSED}
        return ["", aligned(cells), "", f"{len(titles - failed)} of {len(titles)} rows passed"]

    def _spreads(self, result: ScenarioResult) -> list[str]:
        lines = []
        for step in result.steps:
            if len(step.counts) > 1:
                total = sum(step.counts.values())
                lines.append(f"how {total} answers spread in step {step.number} ({_one_line(step.step.title)}):")
                counts = {_one_line(pod) or "(no pod named)": count for pod, count in step.counts.items()}
                widest = max(map(len, counts))
                for pod, count in counts.items():
                    bar = "█" * round(40 * count / total)
                    lines.append(f"  {pod:<{widest}}  {count:>5}  {100 * count / total:5.1f} %  {bar}".rstrip())
                lines.append("")
        return lines


@dataclass(frozen=True, slots=True)
class Row:
    """Steps that belong together under one title, and how they ended together."""

    title: str
    status: Status
    duration_s: float


def rows_of(result: ScenarioResult) -> list[Row]:
    """Return the rows of a result in order: each step that names one begins it."""
    grouped: list[tuple[str, list[StepResult]]] = []
    for step in result.steps:
        if step.step.row:
            grouped.append((step.step.row, []))
        if grouped:
            grouped[-1][1].append(step)
    rows = []
    for title, steps in grouped:
        statuses = {step.status for step in steps}
        worst = next(status for status in (Status.FAILED, Status.NOT_RUN, Status.PASSED) if status in statuses)
        rows.append(Row(title, worst, sum(step.duration_s for step in steps)))
    return rows


def as_dict(result: ScenarioResult, lab: str) -> dict[str, Any]:
    """Return a result as JSON values; docs/scenario.md describes the fields."""
    return {
        "scenario": result.scenario.name,
        "file": str(result.scenario.file),
        "mode": result.mode,
        "lab": lab,
        "kernel": "nested" if result.nested else "own",
        "passed": result.passed,
        "duration_s": round(result.duration_s, 3),
        "steps": [
            {
                "number": step.number,
                "title": step.step.title,
                "row": step.step.row,
                "file": step.step.file,
                "line": step.step.line,
                "status": step.status.value,
                "duration_s": round(step.duration_s, 3),
                "attempts": step.attempts,
                "wanted": step.wanted,
                "seen": step.seen,
                "where": step.where,
                "counts": step.counts,
                "output": step.output[:_MOST_OUTPUT],
                "captures": list(step.captures),
            }
            for step in result.steps
        ],
    }


def json_report(results: Sequence[tuple[ScenarioResult, str]], skipped: Sequence[tuple[str, str, str]]) -> str:
    """Return one JSON document: results with their labs' names, and (scenario, mode, reason) of what was not run."""
    document = {
        "passed": all(result.passed for result, _ in results),
        "results": [as_dict(result, lab) for result, lab in results],
        "skipped": [{"scenario": name, "mode": mode, "reason": reason} for name, mode, reason in skipped],
    }
    return json.dumps(document, indent=2)


def junit_report(results: Sequence[tuple[ScenarioResult, str]], skipped: Sequence[tuple[str, str, str]]) -> str:
    """Return JUnit XML: a test suite per scenario and mode, a test case per step."""
    root = ElementTree.Element("testsuites")
    for result, _lab in results:
        failures = sum(step.status is Status.FAILED for step in result.steps)
        not_run = sum(step.status is Status.NOT_RUN for step in result.steps)
        suite = ElementTree.SubElement(
            root, "testsuite", name=f"{result.scenario.name} ({result.mode})", tests=str(len(result.steps)),
            failures=str(failures), skipped=str(not_run), errors="0", time=f"{result.duration_s:.3f}",
        )  # fmt: skip
        if result.nested:
            properties = ElementTree.SubElement(suite, "properties")
            ElementTree.SubElement(properties, "property", name="kernel", value="nested")
        for step in result.steps:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"{result.scenario.name}.{result.mode}",
                name=_xml(f"{step.number}. {step.step.title}"), file=_xml(step.step.file), line=str(step.step.line),
                time=f"{step.duration_s:.3f}",
            )  # fmt: skip
            if step.status is Status.FAILED:
                failure = ElementTree.SubElement(case, "failure", message=_xml(f"wanted: {step.wanted}"))
                failure.text = _xml(f"wanted: {step.wanted}\nseen: {step.seen}\nwhere: {step.where}")
            elif step.status is Status.NOT_RUN:
                ElementTree.SubElement(case, "skipped", message="an earlier step failed")
    for name, mode, reason in skipped:
        suite = ElementTree.SubElement(
            root, "testsuite", name=f"{name} ({mode})", tests="1", failures="0", skipped="1", errors="0", time="0"
        )
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"{name}.{mode}", name="the whole scenario", time="0"
        )
        ElementTree.SubElement(case, "skipped", message=_xml(reason))
    ElementTree.indent(root)
    # declared here: ElementTree would declare the locale's encoding
    return "<?xml version='1.0' encoding='utf-8'?>\n" + ElementTree.tostring(root, encoding="unicode")


def _xml(text: str) -> str:
    return _XML_FORBIDDEN.sub("�", text)


def check_writable(folder: Path) -> None:
    """Make a folder for reports, before anything is run for them.

    Raises:
        InputError: it cannot be made, or not be written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".testbed"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write reports into {str(folder)!r}: {error.strerror}") from error


def write_reports(
    folder: Path, results: Sequence[tuple[ScenarioResult, str]], skipped: Sequence[tuple[str, str, str]]
) -> None:  # fmt: skip
    """Write scenario.json, junit.xml and observations.json (every single answer) into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "scenario.json", json_report(results, skipped) + "\n")
    write_whole(folder / "junit.xml", junit_report(results, skipped) + "\n")
    observations = [
        {
            "scenario": result.scenario.name,
            "mode": result.mode,
            "step": step.number,
            "observations": [{**asdict(seen), "outcome": seen.outcome.value} for seen in step.observations],
        }
        for result, _lab in results
        for step in result.steps
        if step.observations
    ]
    write_whole(folder / "observations.json", json.dumps(observations, indent=1) + "\n")
