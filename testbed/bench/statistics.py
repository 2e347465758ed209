"""What samples say, and how surely: medians, spreads, bootstrap intervals, lines. Same seed, same answer.

Source of the bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap (1993), 13.3 (percentile intervals).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

LEVEL = 0.95
RESAMPLES = 2000
LEAST_SAMPLES = 5
"""Fewer say nothing about noise: two sets of three samples of one thing lie apart in one case of ten, of five in one of 126."""


@dataclass(frozen=True, slots=True)
class Range:
    """An interval, ends included."""

    low: float
    high: float

    def overlaps(self, other: Range) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A straight line through points, y = intercept + slope · x.

    ``interval`` is the 95% interval of the slope, ``fit`` the share of the medians' variance that the line explains (R²).
    """

    slope: float
    intercept: float
    interval: Range
    fit: float

    @property
    def rises(self) -> bool:
        """Say whether the slope is above 0 beyond noise."""
        return self.interval.low > 0


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of the values are, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def interval_of_median(values: Sequence[float], seed: str) -> Range | None:
    """Return the bootstrap's 95% interval of the median; None when there are too few values."""
    if len(values) < LEAST_SAMPLES:
        return None
    chance = random.Random(seed)  # noqa: S311  # a simulation
    return _percentiles([median(chance.choices(values, k=len(values))) for _ in range(RESAMPLES)])


def fit_line(points: Mapping[float, Sequence[float]], seed: str) -> Line | None:
    """Return the least-squares line through the medians of samples y at each x; None with fewer than three x, or too few samples.

    The interval comes from drawing the samples of each x anew, so x is taken as exact.
    """
    if len(points) < 3 or any(len(samples) < LEAST_SAMPLES for samples in points.values()):
        return None
    xs = sorted(points)
    ys = [median(points[x]) for x in xs]
    slope, intercept = _least_squares(xs, ys)
    chance = random.Random(seed)  # noqa: S311  # a simulation
    drawn = [
        _least_squares(xs, [median(chance.choices(points[x], k=len(points[x]))) for x in xs])[0]
        for _ in range(RESAMPLES)
    ]
    mean = fmean(ys)
    total = sum((y - mean) ** 2 for y in ys)
    rest = sum((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    return Line(slope=slope, intercept=intercept, interval=_percentiles(drawn), fit=1 - rest / total if total else 1.0)


def _least_squares(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    x_mean, y_mean = fmean(xs), fmean(ys)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)
    return slope, y_mean - slope * x_mean


def _percentiles(drawn: Sequence[float]) -> Range:
    tail = (1 - LEVEL) / 2
    return Range(quantile(drawn, tail), quantile(drawn, 1 - tail))


def relative_spread(values: Sequence[float]) -> float:
    """Return the interquartile range divided by the median; 0 when the median is 0."""
    middle = median(values)
    return (quantile(values, 0.75) - quantile(values, 0.25)) / abs(middle) if middle else 0.0


def halves_agree(values: Sequence[float], seed: str) -> bool | None:
    """Say whether the even and the odd rounds of a run have overlapping intervals; None when there are too few of them."""
    even, odd = interval_of_median(values[::2], f"{seed}/even"), interval_of_median(values[1::2], f"{seed}/odd")
    return None if even is None or odd is None else even.overlaps(odd)
