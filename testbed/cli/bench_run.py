"""What ``testbed bench`` does: options and files to benchmarks, progress, outputs, exit statuses."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from msgspec.structs import replace as replace_fields

from testbed.bench.assemble import join, judged, results_of, write_data, write_report
from testbed.bench.compare import as_dict, compare
from testbed.bench.nested import measure_nested, read_order, send_results, why_not_nested
from testbed.bench.placement import Placement, place_modes
from testbed.bench.report import comparison_text, text_report
from testbed.bench.results import Results, read_results, results_json
from testbed.bench.session import Listener, Session, begin_session, measure
from testbed.errors import InputError, LabError, ManifestError, MissingFeature, TestbedError
from testbed.lab.start import check_machine, choose_iptables_backend
from testbed.manifests.benchmark import benchmark_document, load_benchmark, read_benchmark
from testbed.manifests.source import Document
from testbed.manifests.topology import find_topology
from testbed.model.benchmark import Benchmark, Workload
from testbed.scenario.modes import check_mode, why_not, why_not_here
from testbed.scenario.report import check_writable

INTERRUPTED = 130
FAILED = 1
_RESULTS = Path("bench-results")
_PROGRAMS = {"iperf3": Workload.THROUGHPUT, "wrk": Workload.CONNECTIONS}  # the package of each is called the same
_OPTION_OF = {"proxyModes": "modes", "oneKernel": "one-kernel", "keepAlive": "only"}


def benchmark_of_options(
    workload: str, topology: str, parameters: dict[str, Any], settings: dict[str, Any]
) -> Benchmark:  # fmt: skip
    """Return the benchmark that options describe.

    Raises:
        InputError: every option that is wrong.
    """
    try:
        file = find_topology(topology)
    except ManifestError as error:
        raise InputError(f"--topology: {error.problems[0].message}") from error
    document = benchmark_document(workload, file.name, Workload(workload), parameters, settings)
    place = Document(str(file.parent / "options"), document, (0, None))
    benchmark, problems = read_benchmark(place)
    elsewhere = [problem for problem in problems if problem.file != place.file]
    if elsewhere:
        raise ManifestError(elsewhere)
    if benchmark is None:
        raise InputError("\n".join(dict.fromkeys(_about_option(problem.message) for problem in problems)))
    return benchmark


def _about_option(message: str) -> str:
    """Return a message about a field of a document as one about the option it came from."""
    found = re.match(r"spec\.(?:measure\[0\]\.\w+\.)?(\w+)(?:\[\d+\])?: ", message)
    return f"--{_OPTION_OF.get(found[1], found[1])}: {message[found.end() :]}" if found else message


def load_file(file: Path, modes: Sequence[str] | None, *, one_kernel: bool) -> Benchmark:
    """Return a file's benchmark, with what the command line says instead.

    Raises:
        ManifestError: the file is wrong.
        InputError: there is no such mode.
    """
    benchmark = load_benchmark(file)
    for mode in modes or ():
        _check_name(mode)
    if modes:
        benchmark = replace(benchmark, proxy_modes=tuple(dict.fromkeys(modes)), modes_are_given=True)
    return replace(benchmark, one_kernel=benchmark.one_kernel or one_kernel)


def _check_name(mode: str) -> None:
    with suppress(MissingFeature):
        check_mode(mode)


def run_benchmark(
    benchmark: Benchmark,
    *,
    report_folder: Path | None,
    no_report: bool,
    output: str,
    iptables_backend: str | None,
    only_data: bool = False,
) -> int:
    """Measure, print, write reports; return the exit status."""
    placement = _place(benchmark)
    check_machine({program: program for program, workload in _PROGRAMS.items() if benchmark.has(workload)})
    backend = choose_iptables_backend(iptables_backend or "")
    folder = None if no_report else report_folder or _new_folder(benchmark.name)
    if folder is not None:
        check_writable(folder)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was measured is kept then, too
    run = _Run(benchmark, placement, backend, folder, _Narrator(), iptables_backend or "")
    results = run.go()
    if folder is not None:
        run.narrator.say("writing the report")
        write_data(folder, results)
        if not only_data:
            write_report(folder, results)
    run.narrator.clear()
    click.echo(results_json(results) if output == "json" else text_report(results), nl=output != "json")
    if folder is not None and not only_data:
        click.echo(f"\nwritten into {folder}: results.json, results.csv, plots, report.html", err=output == "json")
    if run.refused is not None:
        raise run.refused
    if run.was_interrupted:
        return INTERRUPTED
    return FAILED if run.has_failed else 0


def _new_folder(name: str) -> Path:
    return _RESULTS / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _place(benchmark: Benchmark) -> Placement:
    """Return where each mode is measured.

    Raises:
        MissingFeature: a mode that somebody named cannot be, or none can.
    """
    placement = place_modes(
        benchmark.proxy_modes,
        one_kernel=benchmark.one_kernel,
        why_not_here=lambda mode: why_not(mode) or why_not_here(mode),
        why_not_nested=lambda mode: why_not(mode) or why_not_nested(mode),
    )
    if placement.skipped and (benchmark.modes_are_given or not (placement.here or placement.nested)):
        raise MissingFeature("; ".join(dict.fromkeys(one.reason for one in placement.skipped)))
    return placement


def run_inside(order: str) -> int:
    """Measure on this kernel, the nested one, and send what was found to who asked."""
    benchmark, modes, backend = read_order(order)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    check_machine()
    placement = Placement(modes, (), ())
    run = _Run(benchmark, placement, choose_iptables_backend(backend), None, _Narrator())
    results = run.go()
    run.narrator.clear()
    send_results(results)
    if run.refused is not None:
        raise run.refused
    return INTERRUPTED if run.was_interrupted else 0


class _Run:
    """One run of a benchmark on up to two kernels, one after the other."""

    def __init__(
        self, benchmark: Benchmark, placement: Placement, backend: str, folder: Path | None, narrator: _Narrator,
        chosen_backend: str = "",
    ) -> None:  # fmt: skip
        self.narrator = narrator
        self.refused: TestbedError | None = None
        self.was_interrupted = False
        self._benchmark = benchmark
        self._placement = placement
        self._backend = backend
        self._chosen_backend = chosen_backend  # '' is the kernel's own
        self._folder = folder
        self._began = time.monotonic()
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._session: Session | None = None
        self._nested: Results | None = None
        self._done = (0, 0)

    @property
    def has_failed(self) -> bool:
        """Say whether something was tried and could not be measured."""
        tried = bool(self._session and self._session.recording.skipped)
        return tried or bool(self._nested and any(one.what for one in self._nested.skipped))

    def go(self) -> Results:
        """Measure; what was measured comes back whatever happens, unless nothing was."""
        reason = ""
        try:
            if self._placement.here:
                self._session = begin_session()
                listener = Listener(self.narrator.step, self._count, self._save_draft)
                measure(self._session, self._benchmark, self._placement.here, self._backend, listener)
            if self._placement.nested:
                self._measure_nested()
        except KeyboardInterrupt:
            self.was_interrupted = True
            reason = f"interrupted after {self._done[0]} of {self._done[1]} samples"
        except TestbedError as error:
            self.refused = error
            reason = f"stopped after {self._done[0]} of {self._done[1]} samples: {error}"
            if not self._session or not self._session.recording.samples:
                raise
        return judged(self._results(reason))

    def _measure_nested(self) -> None:
        modes = ", ".join(self._placement.nested)
        self.narrator.step(f"starting the nested kernel for {modes}")
        self._save_draft()
        self.narrator.clear()
        found, status = measure_nested(self._benchmark, self._placement.nested, self._chosen_backend)
        self._nested = replace_fields(found, reason=found.reason and f"nested kernel: {found.reason}")
        self.was_interrupted = status == INTERRUPTED
        if status not in (0, INTERRUPTED):
            raise LabError(f"the testbed in the nested kernel ended with status {status}: {found.reason}")

    def _results(self, reason: str, *, is_draft: bool = False) -> Results:
        duration_s = time.monotonic() - self._began
        results = results_of(
            self._session, self._benchmark, started=self._started, duration_s=duration_s, reason=reason,
            skipped=self._placement.skipped, is_draft=is_draft,
        )  # fmt: skip
        return join(results, self._nested) if self._nested else results

    def _count(self, done: int, total: int) -> None:
        self._done = (done, total)
        self.narrator.count(done, total)

    def _save_draft(self) -> None:
        """Keep what there is so far: nobody can ask for it after a SIGKILL."""
        if self._folder is not None:
            reason = f"the run ended after {self._done[0]} of {self._done[1]} samples"
            write_data(self._folder, self._results(reason, is_draft=True))


class _Narrator:
    """Says on standard error how far a benchmark is: on a terminal in one line, elsewhere a line for each round."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal = sys.stderr.isatty()
        self._clock = clock
        self._began = clock()
        self._progress = ""
        self._round = ""

    def say(self, text: str) -> None:
        if self._terminal:
            line = f"{self._progress}{text} …"[: shutil.get_terminal_size().columns - 1]
            click.echo(f"\r\033[K{line}", nl=False, err=True)

    def step(self, text: str) -> None:
        round_ = text.split(":", 1)[0]
        if not self._terminal and round_ != self._round:
            click.echo(f"{self._progress}{round_}", err=True)
        self._round = round_
        self.say(text)

    def count(self, done: int, total: int) -> None:
        left_s = (self._clock() - self._began) / done * (total - done)
        self._progress = f"[{done}/{total}, {left_s // 60:.0f}:{left_s % 60:02.0f} left] "

    def clear(self) -> None:
        if self._terminal:
            click.echo("\r\033[K", nl=False, err=True)


def compare_files(before: Path, after: Path, *, every: bool, output: str) -> int:
    """Print how two results differ."""
    comparison = compare(read_results(before), read_results(after))
    if output == "json":
        click.echo(json.dumps(as_dict(comparison), indent=2))
    else:
        click.echo(comparison_text(comparison, every=every))
    return 0
