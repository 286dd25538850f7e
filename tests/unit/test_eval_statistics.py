"""Confidence intervals and tests, against published values and hand computations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forecache.workers.evaluation.statistics import mean_difference, paired_test, sign_test, wilson_interval


@pytest.mark.parametrize(
    ("successes", "samples", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_those_of_newcombes_table(successes: int, samples: int, low: float, high: float) -> None:
    interval = wilson_interval(successes / samples, samples)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_wilson_interval_holds_its_value_and_mirrors(counts: tuple[int, int]) -> None:
    successes, samples = counts
    interval = wilson_interval(successes / samples, samples)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.low < interval.high
    mirrored = wilson_interval(1 - successes / samples, samples)
    assert mirrored.low == pytest.approx(1 - interval.high, abs=1e-9)
    wider = wilson_interval(successes / samples, samples, confidence=0.99)
    assert wider.low <= interval.low and wider.high >= interval.high


def test_no_samples_have_no_interval() -> None:
    with pytest.raises(ValueError, match="at least one"):
        wilson_interval(0.0, 0)


@pytest.mark.parametrize(
    ("better", "worse", "p_value"),
    # twice the cumulative binomial probabilities for p = 1/2 of the usual tables
    [(0, 8, 0.0078), (1, 9, 0.0215), (2, 10, 0.0386), (5, 15, 0.0414), (6, 6, 1.0), (0, 0, 1.0), (9, 1, 0.0215)],
)
def test_sign_test_is_the_binomial_table(better: int, worse: int, p_value: float) -> None:
    assert sign_test(better, worse) == pytest.approx(p_value, abs=5e-5)


def test_sign_test_takes_many_samples() -> None:
    assert 0 < sign_test(900, 1100) < 1e-4


def test_paired_test_counts_only_what_differs() -> None:
    test = paired_test([1, 1, 0, 0.5, 0.25], [1, 0, 1, 0.25, 0.25])
    assert (test.better, test.worse) == (2, 1)
    assert test.p_value == 1.0
    with pytest.raises(ValueError, match="longer"):
        paired_test([1], [1, 0])


def test_mean_difference_by_hand() -> None:
    # differences 1, 0, 0, 0: mean 0.25, standard deviation 0.5, standard error 0.25
    alone = mean_difference([([1, 0, 0, 1], [0, 0, 0, 1])])
    assert alone.value == 0.25
    assert alone.high - alone.value == pytest.approx(1.959964 * 0.25, abs=1e-6)
    # a second cell without a difference halves the mean, and the error with it
    both = mean_difference([([1, 0, 0, 1], [0, 0, 0, 1]), ([1, 1], [1, 1])])
    assert both.value == 0.125
    assert both.value - both.low == pytest.approx(1.959964 * 0.125, abs=1e-6)


def test_cells_weigh_the_same_whatever_their_size() -> None:
    assert mean_difference([([1] * 9, [0] * 9), ([0], [1])]).value == 0.0


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1))
def test_swapping_the_sides_mirrors_everything(pairs: list[tuple[float, float]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    there, back = paired_test(first, second), paired_test(second, first)
    assert (there.better, there.worse, there.p_value) == (back.worse, back.better, back.p_value)
    assert 0 < there.p_value <= 1
    assert mean_difference([(first, second)]).value == pytest.approx(-mean_difference([(second, first)]).value)
