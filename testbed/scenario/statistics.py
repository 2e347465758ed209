"""Whether counts could come from picking at random: Pearson's chi-square test of fit, from first principles.

Source: Abramowitz and Stegun, 26.4 (chi-square), 6.5 (incomplete gamma function).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_STEPS = 10_000
_PRECISION = 1e-15


def chi_square_p(counts: Sequence[int]) -> float:
    """Return the probability of counts at least this uneven, if each event fell on each place with the same chance."""
    if len(counts) < 2:
        return 1.0
    mean = sum(counts) / len(counts)
    if mean == 0:
        return 1.0
    statistic = sum((count - mean) ** 2 for count in counts) / mean
    return upper_gamma((len(counts) - 1) / 2, statistic / 2)


def upper_gamma(a: float, x: float) -> float:
    """Return Q(a, x), the regularised upper incomplete gamma function, for a > 0 and x >= 0."""
    if x <= 0:
        return 1.0
    scale = math.exp(-x + a * math.log(x) - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        for step in range(1, _STEPS):
            term *= x / (a + step)
            total += term
            if term < total * _PRECISION:
                break
        return max(0.0, 1 - total * scale)
    # Lentz's method for the continued fraction
    tiny = 1e-300
    b = x + 1 - a
    c, d = 1 / tiny, 1 / b
    fraction = d
    for step in range(1, _STEPS):
        factor = -step * (step - a)
        b += 2
        d = 1 / ((factor * d + b) or tiny)
        c = (b + factor / c) or tiny
        change = c * d
        fraction *= change
        if abs(change - 1) < _PRECISION:
            break
    return scale * fraction
