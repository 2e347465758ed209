"""The chi-square test, against printed tables and closed forms, and what it can tell of a proxy at all."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from testbed.model.scenario import MIN_RANDOM_SAMPLE
from testbed.scenario.judge import P_BOUND
from testbed.scenario.statistics import chi_square_p, upper_gamma


@pytest.mark.parametrize(
    ("degrees", "p", "critical"),
    [
        # NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.4: upper critical values of chi-square
        (1, 0.10, 2.706), (1, 0.05, 3.841), (1, 0.01, 6.635), (1, 0.001, 10.828),
        (2, 0.10, 4.605), (2, 0.05, 5.991), (2, 0.01, 9.210), (2, 0.001, 13.816),
        (3, 0.05, 7.815), (4, 0.05, 9.488), (5, 0.05, 11.070), (5, 0.001, 20.515),
        (9, 0.05, 16.919), (10, 0.01, 23.209), (10, 0.001, 29.588), (30, 0.05, 43.773), (100, 0.05, 124.342),
        # and lower ones, where p is near 1
        (1, 0.90, 0.016), (5, 0.95, 1.145), (10, 0.99, 2.558), (100, 0.999, 61.918),
    ],
)  # fmt: skip
def test_critical_values(degrees: int, p: float, critical: float) -> None:
    """Q(degrees/2, value/2) is the table's p, as exactly as three decimals of the value allow."""
    half = 0.0005
    assert upper_gamma(degrees / 2, (critical + half) / 2) <= p <= upper_gamma(degrees / 2, (critical - half) / 2)


@pytest.mark.parametrize("x", [0.001, 0.5, 1.0, 2.0, 3.0, 30.0, 300.0])
def test_closed_forms(x: float) -> None:
    """One degree of freedom is erfc, two are exp, four are (1 + x)·exp: over both branches, far into the tail."""
    assert upper_gamma(0.5, x) == pytest.approx(math.erfc(math.sqrt(x)), rel=1e-9)
    assert upper_gamma(1.0, x) == pytest.approx(math.exp(-x), rel=1e-9)
    assert upper_gamma(2.0, x) == pytest.approx((1 + x) * math.exp(-x), rel=1e-9)


@pytest.mark.parametrize(
    ("counts", "p"),
    [
        ([], 1.0),
        ([7], 1.0),  # one pod has no choice
        ([0, 0, 0], 1.0),  # nothing happened
        ([100, 100, 100], 1.0),
        ([60, 40], 0.0455003),  # a coin, 100 throws: chi² = 4, p = erfc(√2)
        ([5, 8, 9, 8, 10, 20], 0.0199060),  # a die, 60 throws: chi² = 13.4
        ([90, 110, 100], 0.3678794),  # chi² = 2, two degrees: 1/e
        ([300, 0, 0], 5.148e-131),  # chi² = 600: e⁻³⁰⁰
        ([100_000, 0], 0.0),  # too small for a number; not an error
    ],
)
def test_counts(counts: list[int], p: float) -> None:
    """From counts to p, with the degenerate ones."""
    assert chi_square_p(counts) == pytest.approx(p, rel=1e-3)


def test_order_does_not_matter() -> None:
    """The pods' order says nothing."""
    assert chi_square_p([10, 20, 30]) == pytest.approx(chi_square_p([30, 10, 20]))


def test_many_pods() -> None:
    """A thousand pods, as even as can be, and with one that gets ten times its share."""
    assert chi_square_p([3] * 1000) == 1.0
    assert chi_square_p([300, *[30] * 999]) < 1e-20


def _picks(generator: random.Random, weights: Sequence[float], times: int) -> list[int]:
    seen = Counter(generator.choices(range(len(weights)), weights, k=times))
    return [seen[place] for place in range(len(weights))]


@pytest.mark.parametrize("pods", [2, 3, 10, 50])
def test_an_honest_choice_passes(pods: int) -> None:
    """At the smallest sample that scenarios allow, 2,000 runs of a fair choice all pass (one in a million would not)."""
    generator = random.Random(pods)
    lowest = min(chi_square_p(_picks(generator, [1] * pods, MIN_RANDOM_SAMPLE)) for _ in range(2000))
    assert lowest > P_BOUND
    assert lowest < 0.05  # and the test does see the uneven ones among them


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param([1, 0, 0], id="one pod gets everything"),
        pytest.param([1, 1, 0], id="one pod gets nothing"),
        pytest.param([0.8, 0.2], id="four to one"),
        pytest.param([0.6, 0.2, 0.2], id="one pod is in the rules three times"),
        pytest.param([0.33, 0.22, 0.15, 0.1, 0.2], id="every rule has the probability of the first one but the last"),
    ],
)
def test_a_biased_choice_fails(weights: list[float]) -> None:
    """At the same sample, mistakes that rules can have are found: in expectation, and in nearly every run."""
    expected = [round(MIN_RANDOM_SAMPLE * weight / sum(weights)) for weight in weights]
    assert chi_square_p(expected) < P_BOUND
    generator = random.Random(1)
    found = sum(chi_square_p(_picks(generator, weights, MIN_RANDOM_SAMPLE)) < P_BOUND for _ in range(200))
    assert found >= 140


def test_a_small_bias_needs_more_requests() -> None:
    """What the bound costs: 1/3, 2/9, 4/9 of three pods passes for even with 300 requests, and not with 900."""
    assert chi_square_p([100, 67, 133]) > P_BOUND
    assert chi_square_p([300, 200, 400]) < P_BOUND
