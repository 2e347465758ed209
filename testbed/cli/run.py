"""``testbed run``: every scenario in every mode, each in a lab of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from testbed.errors import InputError, LabError, ManifestError, MissingFeature, Problem, TestbedError
from testbed.lab.folder import list_records
from testbed.lab.start import check_machine, choose_iptables_backend, start_lab
from testbed.manifests import load_scenario
from testbed.model.scenario import Scenario, Step
from testbed.scenario.modes import check_mode, what_kernel_lacks, why_not
from testbed.scenario.report import TextReport, json_report, junit_report, write_reports
from testbed.scenario.runner import ScenarioResult, StepResult, run_scenario


def run_scenarios(
    paths: Sequence[Path],
    modes: Sequence[str],
    iptables_backend: str,
    output: str,
    report_folder: Path | None,
    keep: bool,
) -> int:
    """Run scenarios and print a report; return 0 when everything was as expected, 1 when not."""
    scenarios = _load_all(paths)
    for mode in modes:
        check_mode(mode)
        _check_written_for(scenarios, mode)
    check_machine()
    backend = choose_iptables_backend(iptables_backend)
    if report_folder is not None:
        _check_writable(report_folder)
    planned = [(scenario, mode) for scenario in scenarios for mode in (modes or scenario.proxy_modes)]
    reasons = [why_not(mode) or what_kernel_lacks(scenario.topology) for scenario, mode in planned]
    skipped = [
        (scenario.name, mode, reason) for (scenario, mode), reason in zip(planned, reasons, strict=True) if reason
    ]
    planned = [each for each, reason in zip(planned, reasons, strict=True) if not reason]
    if not planned:
        raise MissingFeature("; ".join(dict.fromkeys(reason for _, _, reason in skipped)))
    narrator = _Narrator(to_stderr=output != "text")
    results: list[tuple[ScenarioResult, str]] = []
    refused: TestbedError | None = None
    try:
        for number, (scenario, mode) in enumerate(planned, 1):
            result, name, ended = _run_one(scenario, mode, backend, narrator, keep=keep and number == len(planned))
            results.append((result, name))
            if ended:
                raise LabError(f"scenario {scenario.name} in {mode}: {ended}")
    except TestbedError as error:  # what has been seen so far is reported all the same
        if not results:
            raise
        refused = error
    for name, mode, reason in skipped:
        narrator.say(f"skipped: {name} in {mode}: {reason}")
    if output == "text":
        narrator.say(narrator.report.summary([result for result, _ in results]))
    else:
        click.echo(json_report(results, skipped) if output == "json" else junit_report(results, skipped))
    if report_folder is not None:
        write_reports(report_folder, results, skipped)
    if refused is not None:
        raise refused
    return 0 if all(result.passed for result, _ in results) else 1


def _check_written_for(scenarios: Sequence[Scenario], mode: str) -> None:
    """Refuse a mode that a scenario does not name: what it expects may be wrong there (how requests spread, for one)."""
    for scenario in scenarios:
        if mode not in scenario.proxy_modes:
            modes = ", ".join(scenario.proxy_modes)
            raise InputError(
                f"{scenario.file}: is for the proxy modes {modes}; add {mode} to its proxyModes to run it there"
            )


def _load_all(paths: Sequence[Path]) -> list[Scenario]:
    scenarios: list[Scenario] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            scenarios.append(load_scenario(path))
        except ManifestError as error:
            problems += error.problems
    warnings = [warning for scenario in scenarios for warning in scenario.warnings]
    for warning in warnings:
        click.echo(str(warning), err=True)
    if problems:
        raise ManifestError(problems)
    return scenarios


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".testbed"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write reports into {str(folder)!r}: {error.strerror}") from error


class _Narrator:
    """Says how far a run is, on standard output, or beside a document on standard error."""

    def __init__(self, *, to_stderr: bool) -> None:
        self._err = to_stderr
        self._terminal = (sys.stderr if to_stderr else sys.stdout).isatty()
        self.report = TextReport(colours=self._terminal)

    def say(self, text: str) -> None:
        click.echo(text, err=self._err)

    def begin(self, number: int, total: int, step: Step) -> None:
        if self._terminal:  # overwritten by the line that says how it ended
            click.echo(f"    {number}/{total} {step.title} …\r", nl=False, err=self._err)

    def end(self, result: StepResult, total: int) -> None:
        clear = "\033[K" if self._terminal else ""
        self.say(clear + self.report.step(result, total))


def _run_one(
    scenario: Scenario, mode: str, backend: str, narrator: _Narrator, *, keep: bool
) -> tuple[ScenarioResult, str, str]:  # fmt: skip
    """Return the result, the lab's name, and, when the lab ended before the scenario did, what is known of that."""
    name = _free_name(scenario.name)
    with start_lab(scenario.topology, name=name, proxy_mode=mode, iptables_backend=backend, attached=True) as lab:
        narrator.say(narrator.report.heading(scenario.name, mode, name))
        result = run_scenario(scenario, mode, lab, on_begin=narrator.begin, on_end=narrator.end)
        ended = "" if result.passed else lab.why_ended()
        if keep and not ended:
            lab.detach()
            narrator.say(f"lab {name} is kept: `testbed exec -l {name} …`, `testbed down {name}`")
    return result, name, ended


def _free_name(wanted: str) -> str:
    """Return a lab name that is not taken: the scenario's, or that with a number."""
    taken = {record.name for record in list_records()}
    base = wanted[:28].rstrip("-.").replace(".", "-")
    number = 1
    name = base
    while name in taken:
        number += 1
        name = f"{base}-{number}"
    return name
