"""``testbed run``: every scenario in every mode, each in a lab of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from testbed.errors import InputError, LabError, ManifestError, MissingFeature, Problem, TestbedError
from testbed.kernel.interrupts import HeldInterrupts
from testbed.kernel.pace import is_nested
from testbed.lab.folder import free_name
from testbed.lab.kubectl import find_kubectl
from testbed.lab.start import check_machine, choose_iptables_backend, start_lab
from testbed.manifests import find_scenarios, load_scenario
from testbed.model.scenario import KubectlStep, ResolveStep, Scenario, Step
from testbed.model.topology import Topology
from testbed.scenario.lanes import Lane, count_lanes, split
from testbed.scenario.modes import NOT_NESTED, check_mode, why_not, why_not_here
from testbed.scenario.nested import Results, nested_arguments, run_nested, send_results
from testbed.scenario.recorder import LabRecorder
from testbed.scenario.report import TextReport, check_writable, json_report, junit_report, write_reports
from testbed.scenario.runner import ScenarioResult, StepResult, run_scenario
from testbed.vm.machine import available_memory_mib
from testbed.vm.machine import check_machine as check_vm
from testbed.vm.plan import DEFAULT_MEMORY_MIB

_ONE_LAB = "course"  # of everything, with --one-lab


@dataclass(frozen=True, slots=True)
class _Planned:
    """One scenario in one mode.

    ``missing``: why this kernel cannot run it, so that the nested one does. ``course``: those of one course (not '') with
    the same topology and mode run in one lab, one after the other.
    """

    path: Path
    scenario: Scenario
    mode: str
    missing: str
    course: str = ""

    @property
    def lab_key(self) -> tuple[str, ...]:
        """What those have in common that may share a lab; () for one of its own."""
        return (self.course, str(self.scenario.topology_file), self.mode) if self.course else ()


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
    one_lab: bool = False
    packets: Path | None = None
    use_vm: bool = True
    results_fd: int | None = None


def run_scenarios(paths: Sequence[Path], options: RunOptions) -> int:
    """Run scenarios and print a report; return 0 when everything was as expected, 1 when not."""
    courses = [(path, _course(given, options)) for given in paths for path in find_scenarios(given)]
    scenarios = _load_all([path for path, _ in courses])
    for mode in options.modes:
        check_mode(mode)
        _check_written_for(paths, scenarios, mode)
    courses, scenarios = _with_those_before(courses, scenarios)
    check_machine(_programs(scenarios, options))
    backend = choose_iptables_backend(options.iptables_backend)
    if options.report_folder is not None:
        check_writable(options.report_folder)
    given = [(path, scenario, course) for (path, course), scenario in zip(courses, scenarios, strict=True)]
    planned, skipped = _plan(given, options)
    if not planned:
        raise MissingFeature("; ".join(dict.fromkeys(reason for _, _, reason in skipped)))
    if options.keep and planned[-1].missing:
        raise InputError(
            f"--keep: the last lab, of {planned[-1].scenario.name} in {planned[-1].mode}, is in a nested kernel that ends "
            "with this command; to look around in one, run `testbed vm -- bash` and `testbed run … --keep` there"
        )
    narrator = _Narrator(to_stderr=options.output != "text")
    try:
        return _run_planned(planned, skipped, backend, narrator, options)
    except KeyboardInterrupt:
        if not narrator.kept:
            raise
        raise KeyboardInterrupt(f"lab {narrator.kept}, which is kept: `testbed down {narrator.kept}`") from None


def _run_planned(
    planned: Sequence[_Planned], skipped: list[tuple[str, str, str]], backend: str, narrator: _Narrator, options: RunOptions
) -> int:  # fmt: skip
    """Run everything, here and in nested kernels, and report; return the exit status."""
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


def _programs(scenarios: Sequence[Scenario], options: RunOptions) -> dict[str, str]:
    """Return program -> Debian package of what steps run on this machine, beside what every lab needs.

    Raises:
        MissingFeature: there is no kubectl, which is in no package.
    """
    steps = [step for scenario in scenarios for step in scenario.steps]
    needed = {}
    if any(isinstance(step, KubectlStep) for step in steps):
        find_kubectl()
    if any(isinstance(step, ResolveStep) for step in steps):
        needed["dig"] = "dnsutils"
    if options.packets is not None and any(step.capture for step in steps):
        needed["tcpdump"] = "tcpdump"
    return needed


def _plan(
    given: Sequence[tuple[Path, Scenario, str]], options: RunOptions
) -> tuple[list[_Planned], list[tuple[str, str, str]]]:  # fmt: skip
    """Return what to run, and what is left out, as scenario, mode and reason. Those that share a lab follow each other.

    Raises:
        MissingFeature: a mode that was asked for by name cannot be run, whatever the topology.
    """
    planned, skipped = [], []
    for mode in options.modes:
        if reason := _what_is_missing(mode, None, options.use_vm)[0]:
            raise MissingFeature(reason)
    for path, scenario, course in given:
        for mode in options.modes or scenario.proxy_modes:
            if mode not in scenario.proxy_modes:
                continue  # of a course, others are for it
            reason, nested = _what_is_missing(mode, scenario.topology, options.use_vm)
            if not reason:
                planned.append(_Planned(path, scenario, mode, nested, course))
            else:
                skipped.append((scenario.name, mode, reason))
    first = {one.lab_key or (str(number),): number for number, one in reversed(list(enumerate(planned)))}
    ordered = sorted(enumerate(planned), key=lambda pair: (first[pair[1].lab_key or (str(pair[0]),)], pair[0]))
    return [one for _, one in ordered], skipped


def _what_is_missing(mode: str, topology: Topology | None, use_vm: bool) -> tuple[str, str]:
    """Return why a mode cannot be run at all in a topology, and what this kernel lacks for it although the nested one can."""
    if reason := why_not(mode):
        return reason, ""
    missing = why_not_here(mode, topology)
    if not missing:
        return "", ""
    if is_nested():
        return missing, ""
    if mode in NOT_NESTED:
        return f"{missing}; {NOT_NESTED[mode]}", ""
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
    left = list(planned)
    while left:
        together = [left.pop(0)]
        while left and left[0].lab_key and left[0].lab_key == together[0].lab_key:
            together.append(left.pop(0))
        tried = _run_together(together, backend, narrator, found, options, keep=options.keep and not left)
        left = together[tried:] + left  # a scenario that failed leaves its lab in disorder: the rest get a new one


def _run_nested(
    planned: Sequence[_Planned], narrator: _Narrator, found: dict[tuple[str, str], tuple[ScenarioResult, str]],
    options: RunOptions,
) -> None:  # fmt: skip
    """Run the scenarios of each mode that needs it in nested kernels: one for each mode and course, or several at a time."""
    for mode, course in dict.fromkeys((one.mode, one.course) for one in planned):
        of_mode = [one for one in planned if (one.mode, one.course) == (mode, course)]

        def arguments(
            lane: Sequence[_Planned], *, to_stderr: bool, mode: str = mode, course: str = course
        ) -> list[str]:
            return nested_arguments(
                [one.path for one in lane], mode, iptables_backend=options.iptables_backend,
                to_stderr=to_stderr, one_lab=bool(course), packets=options.packets,
            )  # fmt: skip

        own, *others = _lanes(of_mode) if course and options.results_fd is None else [of_mode]
        narrator.say(f"{own[0].missing}; running {_names(own)} in {mode} in the nested kernel (testbed vm)")
        with ExitStack() as stack:
            beside = [stack.enter_context(Lane(arguments(lane, to_stderr=False))) for lane in others]
            for lane in others:
                narrator.say(f"at the same time, in another one: {_names(lane)}; what they say follows")
            ends = [run_nested(arguments(own, to_stderr=options.output != "text"), options.packets)]
            _note(ends[0][0], found)
            for running in beside:
                ends.append(running.finish(narrator.say))
                _note(ends[-1][0], found)
        if bad := [status for _, status in ends if status not in (0, 1)]:
            raise LabError(f"the testbed in the nested kernel ended with status {bad[0]}")


def _names(planned: Sequence[_Planned]) -> str:
    return ", ".join(one.scenario.name for one in planned)


def _note(results: Results, found: dict[tuple[str, str], tuple[ScenarioResult, str]]) -> None:
    for result, name in results:
        found[_key(result.scenario, result.mode)] = result, name


def _lanes(planned: Sequence[_Planned]) -> list[list[_Planned]]:
    """Return the scenarios of a course for as many nested kernels as there is room for."""
    groups: list[list[_Planned]] = []
    for one in planned:
        groups.append([one])
        if one.scenario.after is not None:
            before = one.scenario.after.resolve()
            at = next((n for n, group in enumerate(groups[:-1]) if before in _folders(group)), None)
            if at is not None:
                groups[at] += groups.pop()
    room = count_lanes(len(os.sched_getaffinity(0)), available_memory_mib(), DEFAULT_MEMORY_MIB)
    return split(groups, lambda one: len(one.scenario.steps_for(one.mode)), room)


def _folders(planned: Sequence[_Planned]) -> list[Path]:
    return [one.scenario.file.parent.resolve() for one in planned]


def _with_those_before(
    courses: Sequence[tuple[Path, str]], scenarios: Sequence[Scenario]
) -> tuple[list[tuple[Path, str]], list[Scenario]]:
    """Return paths with their courses and scenarios, each after the one that must come first in the same lab."""
    given = {path.resolve() for path, _ in courses}
    paths: list[tuple[Path, str]] = []
    found: list[Scenario] = []
    for (path, course), scenario in zip(courses, scenarios, strict=True):
        chain = [(path, scenario)]
        while (before := chain[0][1].after) is not None and before.resolve() not in given:
            chain.insert(0, (before, load_scenario(before)))
        together = course or (str(path.resolve().parent) if len(chain) > 1 else "")
        paths += [(each, together) for each, _ in chain]
        found += [each for _, each in chain]
    return paths, found


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


def _course(given: Path, options: RunOptions) -> str:
    """Return what the scenarios of an argument have in common if they may share a lab, else ''."""
    if options.one_lab:
        return _ONE_LAB
    return str(given) if find_scenarios(given) != [given] else ""


def _check_written_for(paths: Sequence[Path], scenarios: Sequence[Scenario], mode: str) -> None:
    """Refuse a mode that a scenario does not name: what it expects may be wrong there (how requests spread, for one).

    Of a folder of scenarios those are run that name it, if there are any.
    """
    left = list(scenarios)
    for given in paths:
        of_given = [left.pop(0) for _ in find_scenarios(given)]
        if not any(mode in scenario.proxy_modes for scenario in of_given):
            modes = ", ".join(dict.fromkeys(known for scenario in of_given for known in scenario.proxy_modes))
            file = of_given[0].file if len(of_given) == 1 else given
            raise InputError(f"{file}: is for the proxy modes {modes}; add {mode} to its proxyModes to run it there")


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


class _Narrator:
    """Says how far a run is, on standard output, or beside a document on standard error."""

    def __init__(self, *, to_stderr: bool) -> None:
        self._err = to_stderr
        self._terminal = (sys.stderr if to_stderr else sys.stdout).isatty()
        self.report = TextReport(colours=self._terminal)
        self.kept = ""  # the lab that outlives this command

    def say(self, text: str) -> None:
        click.echo(text, err=self._err)

    def begin(self, number: int, total: int, step: Step) -> None:
        if self._terminal:  # overwritten by the line that says how it ended
            click.echo(f"    {number}/{total} {step.title} …\r", nl=False, err=self._err)

    def end(self, result: StepResult, total: int) -> None:
        clear = "\033[K" if self._terminal else ""
        self.say(clear + self.report.step(result, total))


def _run_together(
    planned: Sequence[_Planned], backend: str, narrator: _Narrator,
    found: dict[tuple[str, str], tuple[ScenarioResult, str]], options: RunOptions, *, keep: bool,
) -> int:  # fmt: skip
    """Run scenarios of one topology and mode in one lab, until one fails; return how many were tried.

    Raises:
        LabError: the lab ended before a scenario did.
    """
    first = planned[0]
    name = free_name(Path(first.course).resolve().name if len(planned) > 1 else first.scenario.name)
    with (
        HeldInterrupts() as interrupts,
        start_lab(
            first.scenario.topology, name=name, proxy_mode=first.mode, iptables_backend=backend, attached=True,
            interrupts=interrupts,
        ) as lab,
        interrupts.let_in(),
    ):  # fmt: skip
        for number, one in enumerate(planned, 1):
            narrator.say(narrator.report.heading(one.scenario.name, one.mode, name, nested=is_nested()))
            with _recorder(options.packets, one.scenario, one.mode, name, narrator) as recorder:
                result = run_scenario(
                    one.scenario, one.mode, lab, on_begin=narrator.begin, on_end=narrator.end, recorder=recorder
                )  # fmt: skip
            found[_key(one.scenario, one.mode)] = result, name
            ended = "" if result.passed else lab.why_ended()
            if ended:
                raise LabError(f"scenario {one.scenario.name} in {one.mode}: {ended}")
            is_last = number == len(planned)
            if keep and is_last:
                with HeldInterrupts():
                    lab.detach()
                    narrator.kept = name
                narrator.say(f"lab {name} is kept: `testbed exec -l {name} …`, `testbed down {name}`")
            if not result.passed:
                break
    return number


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
