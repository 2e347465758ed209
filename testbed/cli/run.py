"""``testbed run``: every scenario in every mode, each in a lab of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from testbed.errors import InputError, LabError, ManifestError, MissingFeature, Problem, TestbedError
from testbed.kernel.pace import is_nested
from testbed.lab.folder import list_records
from testbed.lab.start import check_machine, choose_iptables_backend, start_lab
from testbed.manifests import load_scenario
from testbed.model.scenario import Scenario, Step
from testbed.model.topology import Topology
from testbed.scenario.modes import check_mode, why_not, why_not_here
from testbed.scenario.nested import nested_arguments, run_nested, send_results
from testbed.scenario.recorder import LabRecorder
from testbed.scenario.report import TextReport, json_report, junit_report, write_reports
from testbed.scenario.runner import ScenarioResult, StepResult, run_scenario
from testbed.vm.machine import check_machine as check_vm


@dataclass(frozen=True, slots=True)
class _Planned:
    """One scenario in one mode. ``missing``: why this kernel cannot run it, so that the nested one does."""

    path: Path
    scenario: Scenario
    mode: str
    missing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What `testbed run` was told, beside scenarios. ``results_fd``: we run inside, and who started us reports.

    ``packets``: the folder where packets of steps are kept; None: they are not.
    """

    modes: Sequence[str] = ()
    iptables_backend: str = ""
    output: str = "text"
    report_folder: Path | None = None
    keep: bool = False
    packets: Path | None = None
    use_vm: bool = True
    results_fd: int | None = None


def run_scenarios(paths: Sequence[Path], options: RunOptions) -> int:
    """Run scenarios and print a report; return 0 when everything was as expected, 1 when not."""
    scenarios = _load_all(paths)
    for mode in options.modes:
        check_mode(mode)
        _check_written_for(scenarios, mode)
    check_machine()
    backend = choose_iptables_backend(options.iptables_backend)
    if options.report_folder is not None:
        _check_writable(options.report_folder)
    planned, skipped = _plan(list(zip(paths, scenarios, strict=True)), options)
    if not planned:
        raise MissingFeature("; ".join(dict.fromkeys(reason for _, _, reason in skipped)))
    if options.keep and planned[-1].missing:
        raise InputError(
            f"--keep: the last lab, of {planned[-1].scenario.name} in {planned[-1].mode}, is in a nested kernel that ends "
            "with this command; to look around in one, run `testbed vm -- bash` and `testbed run … --keep` there"
        )
    narrator = _Narrator(to_stderr=options.output != "text")
    found: dict[tuple[str, str], tuple[ScenarioResult, str]] = {}
    refused = None
    try:
        _run_here([one for one in planned if not one.missing], backend, narrator, found, options)
        _run_nested([one for one in planned if one.missing], narrator, found, options)
    except TestbedError as error:  # what has been seen so far is reported all the same
        if not found:
            raise
        refused = error
    results = [found[key] for one in planned if (key := _key(one.scenario, one.mode)) in found]
    for name, mode, reason in skipped:
        narrator.say(f"skipped: {name} in {mode}: {reason}")
    _report(results, skipped, narrator, options)
    if refused is not None:
        raise refused
    return 0 if all(result.passed for result, _ in results) else 1


def _plan(
    given: Sequence[tuple[Path, Scenario]], options: RunOptions
) -> tuple[list[_Planned], list[tuple[str, str, str]]]:  # fmt: skip
    """Return what to run, and what is left out, as scenario, mode and reason.

    Raises:
        MissingFeature: a mode that was asked for by name cannot be run, whatever the topology.
    """
    planned, skipped = [], []
    for mode in options.modes:
        if reason := _what_is_missing(mode, None, options.use_vm)[0]:
            raise MissingFeature(reason)
    for path, scenario in given:
        for mode in options.modes or scenario.proxy_modes:
            reason, nested = _what_is_missing(mode, scenario.topology, options.use_vm)
            if not reason:
                planned.append(_Planned(path, scenario, mode, nested))
            else:
                skipped.append((scenario.name, mode, reason))
    return planned, skipped


def _what_is_missing(mode: str, topology: Topology | None, use_vm: bool) -> tuple[str, str]:
    """Return why a mode cannot be run at all in a topology, and what this kernel lacks for it although the nested one can."""
    if reason := why_not(mode):
        return reason, ""
    missing = why_not_here(mode, topology)
    if not missing:
        return "", ""
    if is_nested():
        return missing, ""
    if mode == "nftables" and topology is not None and topology.needs_netem:
        return f"{missing}; the nested kernel, which has it, has no NAT in nf_tables", ""
    if not use_vm:
        return f"{missing}, and --no-vm keeps it out of the nested kernel", ""
    try:
        check_vm()
    except MissingFeature as error:
        return f"{missing}; {error}", ""
    return "", missing


def _key(scenario: Scenario, mode: str) -> tuple[str, str]:
    return str(scenario.file), mode


def _run_here(
    planned: Sequence[_Planned], backend: str, narrator: _Narrator,
    found: dict[tuple[str, str], tuple[ScenarioResult, str]], options: RunOptions,
) -> None:  # fmt: skip
    for number, one in enumerate(planned, 1):
        last = number == len(planned)
        result, name, ended = _run_one(
            one.scenario, one.mode, backend, narrator, keep=options.keep and last, packets=options.packets
        )
        found[_key(one.scenario, one.mode)] = result, name
        if ended:
            raise LabError(f"scenario {one.scenario.name} in {one.mode}: {ended}")


def _run_nested(
    planned: Sequence[_Planned], narrator: _Narrator, found: dict[tuple[str, str], tuple[ScenarioResult, str]],
    options: RunOptions,
) -> None:  # fmt: skip
    """Run the scenarios of each mode that needs it in a nested kernel: one boot a mode."""
    for mode in dict.fromkeys(one.mode for one in planned):
        of_mode = [one for one in planned if one.mode == mode]
        names = ", ".join(one.scenario.name for one in of_mode)
        narrator.say(f"{of_mode[0].missing}; running {names} in {mode} in the nested kernel (testbed vm)")
        arguments = nested_arguments(
            [one.path for one in of_mode], mode, iptables_backend=options.iptables_backend,
            to_stderr=options.output != "text", packets=options.packets,
        )  # fmt: skip
        results, status = run_nested(arguments, options.packets)
        for result, name in results:
            found[_key(result.scenario, result.mode)] = result, name
        if status not in (0, 1):
            raise LabError(f"the testbed in the nested kernel ended with status {status}")


def _report(
    results: list[tuple[ScenarioResult, str]], skipped: list[tuple[str, str, str]], narrator: _Narrator,
    options: RunOptions,
) -> None:  # fmt: skip
    if options.results_fd is not None:
        send_results(options.results_fd, results)
        return
    if options.output == "text":
        narrator.say(narrator.report.summary([result for result, _ in results]))
    else:
        click.echo(json_report(results, skipped) if options.output == "json" else junit_report(results, skipped))
    if options.report_folder is not None:
        write_reports(options.report_folder, results, skipped)


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
    scenario: Scenario, mode: str, backend: str, narrator: _Narrator, *, keep: bool, packets: Path | None
) -> tuple[ScenarioResult, str, str]:  # fmt: skip
    """Return the result, the lab's name, and, when the lab ended before the scenario did, what is known of that."""
    name = _free_name(scenario.name)
    with start_lab(scenario.topology, name=name, proxy_mode=mode, iptables_backend=backend, attached=True) as lab:
        narrator.say(narrator.report.heading(scenario.name, mode, name, nested=is_nested()))
        with _recorder(packets, scenario, mode, name, narrator) as recorder:
            result = run_scenario(
                scenario, mode, lab, on_begin=narrator.begin, on_end=narrator.end, recorder=recorder
            )  # fmt: skip
        ended = "" if result.passed else lab.why_ended()
        if keep and not ended:
            lab.detach()
            narrator.say(f"lab {name} is kept: `testbed exec -l {name} …`, `testbed down {name}`")
    return result, name, ended


@contextmanager
def _recorder(
    folder: Path | None, scenario: Scenario, mode: str, lab: str, narrator: _Narrator
) -> Iterator[LabRecorder | None]:  # fmt: skip
    """Keep packets in the report folder, if there is one."""
    if folder is None:
        yield None
        return
    with LabRecorder(lab, scenario.topology, folder, f"{scenario.name}-{mode}", warn=narrator.say) as recorder:
        yield recorder


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
