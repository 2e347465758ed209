"""report.html: one file that needs nothing else, from nobody."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader

from testbed.bench.report import (
    HEADER,
    machine_lines,
    series_rows,
    skipped_text,
    slope_text,
    verdict_text,
)
from testbed.bench.results import Results

_RIGHT = (2, 5, 6, 7, 8, 9)


def html_report(results: Results, plots: Sequence[tuple[str, Path]]) -> str:
    """Return the report as HTML.

    Args:
        plots: title and SVG file of each; they go into the text.
    """
    environment = Environment(loader=PackageLoader("testbed.bench", "files"), autoescape=True, trim_blocks=True)
    pictures = [{"title": title, "data": base64.b64encode(file.read_bytes()).decode()} for title, file in plots]
    return environment.get_template("report.html").render(
        results=results,
        header=HEADER,
        right=_RIGHT,
        rows=series_rows(one for one in results.series if one.main),
        others=series_rows(one for one in results.series if not one.main),
        verdicts=[verdict_text(one) for one in results.verdicts],
        slopes=[slope_text(one) for one in results.slopes],
        skipped=[skipped_text(one.mode, one.what, one.reason) for one in results.skipped],
        machines=[(machine.id, machine_lines(machine)) for machine in results.machines],
        plots=pictures,
    )
