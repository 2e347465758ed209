"""Sessions to results, results of two kernels to one, results to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from testbed.bench.report import csv_text, order_of
from testbed.bench.results import FORMAT, Results, Settings, Skipped, results_json
from testbed.bench.session import Session
from testbed.bench.summary import find_noise, fit_slopes, judge_modes, summarise
from testbed.kernel.files import write_whole, writing
from testbed.model.benchmark import Benchmark

_UNFINISHED = "the run ended before it was complete"


def settings_of(benchmark: Benchmark) -> Settings:
    return Settings(
        topology=benchmark.topology.name, modes=list(benchmark.proxy_modes), services=list(benchmark.services),
        samples=benchmark.samples, duration_s=benchmark.duration_s, clients=benchmark.clients,
        endpoints=benchmark.endpoints, seed=benchmark.seed, one_kernel=benchmark.one_kernel,
    )  # fmt: skip


def results_of(
    session: Session | None, benchmark: Benchmark, *, started: str, duration_s: float, reason: str = _UNFINISHED,
    skipped: Sequence[Skipped] = (), is_draft: bool = False,
) -> Results:  # fmt: skip
    """Return what a session has found.

    Args:
        reason: why it is not complete; '' when it is.
        skipped: what was not even begun.
        is_draft: without intervals, which take their time.
    """
    recording = session.recording if session else None
    series = summarise(recording.samples, benchmark.seed, with_intervals=not is_draft) if recording else []
    if session and recording:
        session.machine.load_during = list(recording.loads)
    return Results(
        api_version=FORMAT, kind="BenchmarkResults", name=benchmark.name, complete=not reason, reason=reason,
        started=started, duration_s=round(duration_s, 1), settings=settings_of(benchmark),
        machines=[session.machine] if session else [], series=series, verdicts=[], slopes=[],
        skipped=[*skipped, *(recording.skipped if recording else ())], warnings=[],
    )  # fmt: skip


def join(first: Results, second: Results) -> Results:
    """Return the results of two kernels as one."""
    return msgspec.structs.replace(
        first,
        complete=first.complete and second.complete,
        reason="; ".join(filter(None, (first.reason, second.reason))),
        machines=[*first.machines, *second.machines],
        series=[*first.series, *second.series],
        skipped=[*first.skipped, *second.skipped],
    )


def judged(results: Results) -> Results:
    """Return results in the order of tables, with what follows from them: modes side by side, slopes, warnings."""
    seed = results.settings.seed
    series = sorted(results.series, key=order_of)
    return msgspec.structs.replace(
        results,
        series=series,
        verdicts=judge_modes(series),
        slopes=fit_slopes(series, seed),
        warnings=find_noise(series, results.machines, seed),
    )


def write_data(folder: Path, results: Results) -> None:
    """Write results.json and results.csv, each in one step."""
    for name, text in (("results.json", results_json(results)), ("results.csv", csv_text(results))):
        write_whole(folder / name, text)


def write_report(folder: Path, results: Results) -> None:
    """Write plots/*.svg and *.png, and report.html with the plots in it."""
    from testbed.bench.html import html_report
    from testbed.bench.plots import plan_plots, write_plots

    plots = plan_plots(results)
    with writing(folder / "plots"):
        files = write_plots(folder / "plots", plots) if plots else []
    titled = [(plot.title, file) for plot, file in zip(plots, files, strict=True)]
    write_whole(folder / "report.html", html_report(results, titled))
