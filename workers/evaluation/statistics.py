"""How sure an accuracy is, and whether two of them on the same samples differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedTest:
    """Two ways to answer the same samples: on how many was the first ``better``, on how many ``worse``.

    ``p_value``: two-sided, exact; how likely so uneven a split is if neither is better.
    """

    better: int
    worse: int
    p_value: float


@dataclass(frozen=True)
class Interval:
    """A value with its two-sided confidence interval."""

    value: float
    low: float
    high: float


def wilson_interval(accuracy: float, samples: int, confidence: float = CONFIDENCE) -> Interval:
    """Score interval of a proportion (Wilson 1927, JASA 22:209).

    ``accuracy``: the mean of ``samples`` values in [0, 1]. Where they are shares and not only 0 and 1, their variance
    is at most that of a proportion, so the interval is no narrower than it should be.
    """
    if samples < 1:
        raise ValueError("an interval needs at least one sample")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    scale = 1 + z * z / samples
    centre = (accuracy + z * z / (2 * samples)) / scale
    half = z / scale * math.sqrt(accuracy * (1 - accuracy) / samples + z * z / (4 * samples * samples))
    # rounding may leave them a hair outside, or beyond the value at 0 and 1
    return Interval(accuracy, min(accuracy, max(0.0, centre - half)), max(accuracy, min(1.0, centre + half)))


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """McNemar's test in its exact form: are samples on which only one is right split evenly?

    With scores between 0 and 1 it is the sign test on the samples whose scores differ, of which McNemar's test is the
    case of right and wrong. ``first`` and ``second``: scores of the same samples, in the same order.
    """
    better = sum(a > b for a, b in zip(first, second, strict=True))
    worse = sum(a < b for a, b in zip(first, second, strict=True))
    return PairedTest(better, worse, sign_test(better, worse))


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact p-value of ``better`` against ``worse`` where both are equally likely (binomial, p = 1/2)."""
    trials = better + worse
    tail = sum(math.comb(trials, k) for k in range(min(better, worse) + 1))
    return min(1.0, (2 * tail) / (1 << trials))


def mean_difference(
    cells: Sequence[tuple[Sequence[float], Sequence[float]]], confidence: float = CONFIDENCE
) -> Interval:
    """Mean over ``cells`` of (mean of the first scores − mean of the second), every cell weighing the same.

    Each cell holds scores of the same samples in the same order. The interval is the normal approximation with the
    variance of the paired differences within the cells (stratified sampling: Cochran 1977, §5.3).
    """
    if not cells:
        raise ValueError("a mean needs at least one cell")
    means, variance = [], 0.0
    for first, second in cells:
        differences = [a - b for a, b in zip(first, second, strict=True)]
        mean = fmean(differences)
        means.append(mean)
        if len(differences) > 1:
            spread = sum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
            variance += spread / len(differences)
    value = fmean(means)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(variance) / len(cells)
    return Interval(value, value - half, value + half)
