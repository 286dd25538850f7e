"""Confidence intervals of accuracies, and tests of whether two accuracies on the same samples differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedTest:
    """Two sets of scores of the same samples: on how many the first is ``better``, and on how many ``worse``.

    ``p_value``: two-sided and exact; probability of a split at least as uneven if neither is better.
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

    ``accuracy``: mean of ``samples`` values in [0, 1]. Values between 0 and 1 have at most the variance of a
    proportion, so the interval is wide enough for them too.
    """
    if samples < 1:
        raise ValueError("an interval needs at least one sample")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    scale = 1 + z * z / samples
    centre = (accuracy + z * z / (2 * samples)) / scale
    half = z / scale * math.sqrt(accuracy * (1 - accuracy) / samples + z * z / (4 * samples * samples))
    # rounding may push a bound out of [0, 1], or past the value
    return Interval(accuracy, min(accuracy, max(0.0, centre - half)), max(accuracy, min(1.0, centre + half)))


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """McNemar's exact test: whether samples on which only one is right are split evenly.

    For scores between 0 and 1 it is the sign test on samples whose scores differ, which for scores of 0 and 1 equals
    McNemar's test. ``first`` and ``second``: scores of the same samples, in the same order.
    """
    better = sum(a > b for a, b in zip(first, second, strict=True))
    worse = sum(a < b for a, b in zip(first, second, strict=True))
    return PairedTest(better, worse, sign_test(better, worse))


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact p-value of ``better`` against ``worse`` if both are equally likely (binomial, p = 1/2)."""
    trials = better + worse
    tail = sum(math.comb(trials, k) for k in range(min(better, worse) + 1))
    return min(1.0, (2 * tail) / (1 << trials))


def mean_difference(cells: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Interval:
    """Mean over ``cells`` of (mean of the first scores − mean of the second scores), with equal weights.

    Each cell has the scores of the same samples, in the same order. The interval is the normal approximation with the
    variance of the paired differences within cells (stratified sampling: Cochran 1977, §5.3).
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
    half = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * math.sqrt(variance) / len(cells)
    return Interval(value, value - half, value + half)
