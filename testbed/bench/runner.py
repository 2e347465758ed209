"""Takes samples in turns: round after round, in each every case, of each case every mode. Knows nothing of labs.

What was measured before an error or an interrupt is kept; `Recording.samples` grows while `record` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from testbed.bench.results import Skipped
from testbed.bench.summary import Sample
from testbed.errors import LabError, TestbedError
from testbed.model.benchmark import Benchmark, Case


class Site(Protocol):
    """One mode's cluster."""

    def prepare(self, services: int) -> None:
        """Have that many Services; numbers only grow."""
        ...

    def sample(self, case: Case) -> dict[str, float]:
        """Measure once."""
        ...


@dataclass(slots=True)
class Recording:
    """What was measured, what could not be, and the load at the end of each round."""

    samples: list[Sample] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Step:
    """One sample to take. Round 0 is warm-up, and its samples are dropped."""

    services: int
    round: int
    case: Case
    mode: str


def plan(benchmark: Benchmark, modes: Sequence[str]) -> list[Step]:
    """Return all samples in the order in which they are taken.

    Modes take turns in being first, so that none always follows the same other.
    """
    steps = []
    for services in sorted(benchmark.services):
        for number in range(benchmark.samples + 1):
            for case in benchmark.cases:
                turn = number % len(modes)
                steps += [Step(services, number, case, mode) for mode in (*modes[turn:], *modes[:turn])]
    return steps


def record(
    benchmark: Benchmark,
    sites: Mapping[str, Site],
    recording: Recording,
    *,
    machine: str,
    on_step: Callable[[str], None] = lambda _: None,
    on_done: Callable[[int, int], None] = lambda done, total: None,
    on_round: Callable[[], None] = lambda: None,
    load: Callable[[], float] = lambda: 0.0,
) -> None:
    """Take all samples. A case that fails in a mode while warming up is skipped there; later, that sample is missing.

    Args:
        on_step: called with words for what begins.
        on_done: called with how many samples of how many are taken.
        on_round: called after each round.

    Raises:
        LabError: a lab has ended.
    """
    steps = plan(benchmark, list(sites))
    failing: set[tuple[str, int, Case]] = set()
    at: tuple[int, int] | None = None
    for number, step in enumerate(steps):
        if at != (step.services, step.round):
            if at is not None:
                recording.loads.append(load())
                on_round()
            if at is None or at[0] != step.services:
                _prepare(sites, step.services, on_step)
            at = (step.services, step.round)
        if (step.mode, step.services, step.case) not in failing:
            turn = f"round {step.round}" if step.round else "warm-up"
            on_step(f"{step.services} Services, {turn}: {step.case} in {step.mode}")
            values = _sample(sites[step.mode], step, failing, recording)
            if values and step.round:
                recording.samples.append(
                    Sample(
                        machine=machine, mode=step.mode, case=step.case, services=step.services, round=step.round,
                        values=values,
                    )
                )  # fmt: skip
        on_done(number + 1, len(steps))
    recording.loads.append(load())


def _prepare(sites: Mapping[str, Site], services: int, on_step: Callable[[str], None]) -> None:
    for mode, site in sites.items():
        on_step(f"making {services} Services in {mode}")
        site.prepare(services)


def _sample(
    site: Site, step: Step, failing: set[tuple[str, int, Case]], recording: Recording
) -> dict[str, float] | None:  # fmt: skip
    try:
        return site.sample(step.case)
    except LabError:
        raise
    except TestbedError as error:
        what = f"{step.case}, {step.services} Services"
        if step.round:
            what += f", round {step.round}"
        else:
            failing.add((step.mode, step.services, step.case))
        recording.skipped.append(Skipped(mode=step.mode, what=what, reason=str(error)))
        return None
