"""Samples to figures: series with intervals and ratios, modes side by side, lines over the number of Services. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import Literal, cast

from testbed.bench.results import Beyond, Interval, Machine, Ratio, Series, Slope, Verdict
from testbed.bench.statistics import Range, fit_line, halves_agree, interval_of_median, quantile, relative_spread
from testbed.model.benchmark import Case, Workload

NOISY_SPREAD = 0.25
"""From here on the report says of a figure that it is noisy: interquartile range over median."""
BUSY_SHARE = 0.2
STEADY_ORDER = ("userspace", "iptables", "ipvs", "nftables")


@dataclass(frozen=True, slots=True)
class Metric:
    """A number that a sample gives. ``main``: in the terminal's table; ``has_ratio``: comparable with the direct path's."""

    unit: str
    better: Literal["higher", "lower"]
    main: bool = False
    has_ratio: bool = False


METRICS: Mapping[str, Metric] = {
    "rate": Metric("Gbit/s", "higher", main=True, has_ratio=True),
    "received": Metric("Mbit/s", "higher", main=True, has_ratio=True),
    "loss": Metric("%", "lower", main=True),
    "jitter": Metric("ms", "lower", main=True),
    "retransmits": Metric("segments", "lower"),
    "requests": Metric("requests/s", "higher", main=True, has_ratio=True),
    # the tenth part that was disturbed least: what a path takes when nobody else wants the processor
    "p10": Metric("µs", "lower", main=True, has_ratio=True),
    "p50": Metric("µs", "lower", main=True, has_ratio=True),
    "p99": Metric("µs", "lower", has_ratio=True),
    "errors": Metric("requests", "lower"),
    "to_kernel": Metric("ms", "lower", main=True),
    "own": Metric("ms", "lower", main=True),
    # CPU time, of one request or of one gigabyte
    "client_cpu": Metric("µs/request", "lower"),
    "server_cpu": Metric("µs/request", "lower"),
    "softirq_cpu": Metric("µs/request", "lower"),
    "machine_cpu": Metric("µs/request", "lower"),
    "client_cpu_gb": Metric("s/GB", "lower"),
    "server_cpu_gb": Metric("s/GB", "lower"),
    "softirq_cpu_gb": Metric("s/GB", "lower"),
    "machine_cpu_gb": Metric("s/GB", "lower"),
}
_NOT_MAIN_OF = {(Workload.CONNECTIONS, "p50")}
"""Under a load that fills the processor, latency follows from the rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement. ``round`` counts from 1."""

    machine: str
    mode: str
    case: Case
    services: int
    round: int
    values: Mapping[str, float]


@dataclass(slots=True)
class _Points:
    rounds: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def summarise(samples: Iterable[Sample], seed: int, *, with_intervals: bool = True) -> list[Series]:
    """Return a series for each machine, mode, case, number of Services and metric, in the order of the samples."""
    interval = _interval_of if with_intervals else _no_interval
    points: dict[tuple[str, str, Case, int, str], _Points] = defaultdict(_Points)
    for sample in samples:
        for name, value in sample.values.items():
            found = points[sample.machine, sample.mode, sample.case, sample.services, name]
            found.rounds.append(sample.round)
            found.values.append(value)
    made = []
    for (machine, mode, case, services, name), found in points.items():
        base = points.get((machine, mode, case.baseline, services, name))
        label = f"{seed}/{machine}/{mode}/{case}/{services}/{name}"
        metric = METRICS[name]
        made.append(
            Series(
                machine=machine, mode=mode, workload=cast(Literal["sync"], case.workload.value), case=case.name,
                path=case.path.value, position=case.position.value if case.position else "", services=services,
                metric=name, unit=metric.unit, better=metric.better,
                main=metric.main and (case.workload, name) not in _NOT_MAIN_OF,
                rounds=found.rounds, samples=found.values, median=median(found.values),
                q1=quantile(found.values, 0.25), q3=quantile(found.values, 0.75),
                interval=interval(found.values, label),
                ratio=_ratio(found, base, case, label, interval) if base and metric.has_ratio else None,
            )
        )  # fmt: skip
    return made


def _ratio(
    found: _Points, base: _Points, case: Case, label: str, interval: Callable[[Sequence[float], str], Interval | None]
) -> Ratio | None:
    """Divide round by round: what the machine does to both at that time cancels out."""
    if case.path.is_baseline:
        return None
    below = dict(zip(base.rounds, base.values, strict=True))
    pairs = [
        value / below[number] for number, value in zip(found.rounds, found.values, strict=True) if below.get(number)
    ]
    if not pairs:
        return None
    return Ratio(path=case.path.baseline.value, median=median(pairs), interval=interval(pairs, f"{label}/ratio"))


def _interval_of(values: Sequence[float], seed: str) -> Interval | None:
    found = interval_of_median(values, seed)
    return Interval(low=found.low, high=found.high) if found else None


def _no_interval(_values: Sequence[float], _seed: str) -> None:
    return None


def overlap(a: Interval | None, b: Interval | None) -> bool:
    """Say whether two intervals overlap; an interval that is not known overlaps everything."""
    return a is None or b is None or Range(a.low, a.high).overlaps(Range(b.low, b.high))


def judge_modes(series: Sequence[Series]) -> list[Verdict]:
    """Return every two modes of one kernel side by side, for the main metrics of every path with a Service."""
    groups: dict[tuple[str, ...], list[Series]] = defaultdict(list)
    for one in series:
        if one.main and one.path not in ("direct", "direct-same-node"):
            groups[one.machine, *one.key].append(one)
    return [
        Verdict(
            machine=a.machine, workload=a.workload, case=a.case, path=a.path, position=a.position, services=a.services,
            metric=a.metric, a=a.mode, b=b.mode, times=b.median / a.median if a.median else 0.0,
            differ=not overlap(a.interval, b.interval), enough=a.interval is not None and b.interval is not None,
        )
        for group in groups.values()
        for a, b in combinations(sorted(group, key=lambda one: STEADY_ORDER.index(one.mode)), 2)
    ]  # fmt: skip


def fit_slopes(series: Sequence[Series], seed: int) -> list[Slope]:
    """Return the line through each main figure that was taken at three or more numbers of Services."""
    groups: dict[tuple[str, ...], list[Series]] = defaultdict(list)
    known = {(one.machine, one.mode, *one.key): one for one in series}
    for one in series:
        if one.main:
            workload, case, path, position, _, metric = one.key
            groups[one.machine, one.mode, workload, case, path, position, metric].append(one)
    slopes = []
    for group in groups.values():
        one = group[0]
        label = f"{seed}/{one.mode}/{one.subject}"
        line = fit_line({each.services: each.samples for each in group}, label)
        if line:
            slopes.append(
                Slope(
                    machine=one.machine, mode=one.mode, workload=one.workload, case=one.case, path=one.path,
                    position=one.position, metric=one.metric, unit=one.unit, per_service=line.slope,
                    interval=Interval(low=line.interval.low, high=line.interval.high), fit=line.fit, rises=line.rises,
                    beyond=_beyond(group, known, label),
                )
            )  # fmt: skip
    return slopes


def _beyond(group: Sequence[Series], known: Mapping[tuple[str, ...], Series], label: str) -> Beyond | None:
    """Fit what is left of a figure without the direct path's of the same round: what everything rises by cancels out."""
    left: dict[float, list[float]] = {}
    for one in group:
        if one.ratio is None:
            return None
        base = known[one.machine, one.mode, one.workload, one.case, one.ratio.path, "", str(one.services), one.metric]
        below = dict(zip(base.rounds, base.samples, strict=True))
        pairs = zip(one.rounds, one.samples, strict=True)
        left[one.services] = [value - below[number] for number, value in pairs if number in below]
    line = fit_line(left, f"{label}/beyond")
    if line is None:
        return None
    return Beyond(
        path=base.path, per_service=line.slope, rises=line.rises,
        interval=Interval(low=line.interval.low, high=line.interval.high),
    )  # fmt: skip


def find_noise(series: Sequence[Series], machines: Sequence[Machine], seed: int) -> list[str]:
    """Return what makes figures doubtful: a busy machine, wide spreads, halves of a run that disagree."""
    warnings = []
    for machine in machines:
        if machine.busy_before > BUSY_SHARE:
            warnings.append(
                f"{machine.id}: the machine was busy before the first lab: {machine.busy_before:.0%} of {machine.cpus} CPUs "
                f"(load {machine.load_before:.1f})"
            )
    for one in series:
        if not one.main:
            continue
        label = f"{one.subject}, {one.mode}, {one.metric}"
        spread = relative_spread(one.samples)
        if spread > NOISY_SPREAD and len(one.samples) > 1:
            warnings.append(
                f"too noisy: {label}: the middle half of the samples spreads over {spread:.0%} of the median"
            )
        if halves_agree(one.samples, f"{seed}/{label}") is False:
            warnings.append(f"too noisy: {label}: even and odd rounds disagree by more than their 95% intervals")
    return warnings
