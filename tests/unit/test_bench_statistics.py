"""What samples say: medians, bootstrap intervals, lines; and when they say nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.bench.statistics import Range, fit_line, halves_agree, interval_of_median, quantile, relative_spread

VALUES = st.lists(st.floats(0.001, 1e6), min_size=5, max_size=20)


@pytest.mark.parametrize(
    ("values", "share", "found"),
    [([3, 1, 2], 0.5, 2), ([1, 2, 3, 4], 0.25, 1.75), ([1, 2, 3, 4, 5], 0.75, 4), ([7], 0.99, 7), ([1, 2], 1, 2)],
)
def test_quantiles(values: list[float], share: float, found: float) -> None:
    """Quantiles lie between neighbours as numpy's do."""
    assert quantile(values, share) == found


@settings(max_examples=20)
@given(VALUES)
def test_interval_is_within_the_samples_and_repeatable(values: list[float]) -> None:
    """An interval of the median never leaves the samples, and the same seed gives the same one."""
    found = interval_of_median(values, "a")
    assert found is not None and min(values) <= found.low <= found.high <= max(values)
    assert interval_of_median(values, "a") == found


def test_four_samples_have_no_interval() -> None:
    """Few samples say nothing about noise."""
    assert interval_of_median([1, 2, 3, 4], "a") is None


def test_interval_covers_the_truth() -> None:
    """Of 50 seeded experiments of 15 samples, nearly all intervals hold the true median."""
    chance = random.Random(4)
    held = 0
    for number in range(50):
        found = interval_of_median([chance.gauss(100, 10) for _ in range(15)], str(number))
        assert found is not None
        held += found.low <= 100 <= found.high
    assert held >= 44


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [((1, 2), (2, 3), True), ((1, 2), (2.1, 3), False), ((1, 9), (4, 5), True), ((4, 5), (1, 3), False)],
)
def test_overlap(a: tuple[float, float], b: tuple[float, float], overlap: bool) -> None:
    """Ends belong to an interval."""
    assert Range(*a).overlaps(Range(*b)) is overlap


def noisy_line(slope: float, noise: float) -> dict[float, list[float]]:
    chance = random.Random(7)
    return {x: [50 + slope * x + chance.gauss(0, noise) for _ in range(7)] for x in (0, 1000, 5000, 10000)}


@pytest.mark.parametrize(
    ("slope", "noise", "rises"),
    [
        pytest.param(0.0105, 3, True, id="iptables: 10.5 ns for each Service"),
        pytest.param(0.0, 3, False, id="nftables: flat"),
        pytest.param(0.0105, 400, False, id="a slope that noise hides"),
    ],
)
def test_lines(slope: float, noise: float, rises: bool) -> None:
    """A slope counts only when its interval is above 0; a straight line explains its medians."""
    line = fit_line(noisy_line(slope, noise), "a")
    assert line is not None and line.rises is rises
    if rises:
        assert line.interval.low <= slope <= line.interval.high
        assert line.fit > 0.98 and line.intercept == pytest.approx(50, abs=5)


def test_a_line_needs_three_places() -> None:
    """Through two points there is always a line, so it proves nothing; nor do few samples at each."""
    five = [1, 2, 3, 4, 5]
    assert fit_line({0: five, 1000: five}, "a") is None
    assert fit_line({0: five, 1000: five, 5000: five[:4]}, "a") is None


def test_halves() -> None:
    """A run that drifts between even and odd rounds disagrees with itself; few rounds have no halves."""
    assert halves_agree([10, 10.2, 10.1, 9.9, 10, 10.1, 9.8, 10, 10, 10], "a") is True
    assert halves_agree([10, 20] * 5, "a") is False
    assert halves_agree([10, 20] * 4, "a") is None


def test_spread() -> None:
    """The spread is that of the middle half, as a share of the median."""
    assert relative_spread([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)
    assert relative_spread([0, 0, 0]) == 0
