"""Budgets and resident sets."""

import math
from typing import Literal, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.selection import LEAST_SCORED_CHUNKS, budget_chunks, recency_chunks, select

configs = st.builds(
    SelectionConfig,
    sink_chunks=st.integers(0, 4),
    recency_fraction=st.floats(0, 0.9),
    min_chunks=st.integers(1, 20),
)
Policy = Literal["lookahead", "recency", "random", "full"]
policies: st.SearchStrategy[Policy] = st.sampled_from(get_args(Policy))


@st.composite
def scored(draw: st.DrawFn) -> np.ndarray:
    # few distinct values, so that ties are common
    return np.array(draw(st.lists(st.integers(0, 5), max_size=200)), dtype=np.float32)


@given(chunks=st.integers(0, 3000), keep_ratio=st.floats(0.001, 1), config=configs)
def test_budget_is_the_ratio_with_a_floor_and_a_cap(chunks: int, keep_ratio: float, config: SelectionConfig) -> None:
    budget = budget_chunks(chunks, keep_ratio, config)
    assert budget <= chunks
    if budget < chunks:
        assert budget >= max(math.ceil(keep_ratio * chunks), config.min_chunks)
        assert budget - recency_chunks(budget, config) - config.sink_chunks >= LEAST_SCORED_CHUNKS
        # not one chunk more than one of the three asks for
        smaller = budget - 1
        assert (
            smaller < max(math.ceil(keep_ratio * chunks), config.min_chunks)
            or smaller - recency_chunks(smaller, config) - config.sink_chunks < LEAST_SCORED_CHUNKS
        )


def test_budget_of_the_defaults() -> None:
    config = SelectionConfig()
    assert [budget_chunks(n, 0.135, config) for n in (0, 5, 8, 47, 60, 101, 2048)] == [0, 5, 8, 8, 9, 14, 277]
    assert budget_chunks(2048, 1.0, config) == 2048


@given(scores=scored(), policy=policies, budget=st.integers(0, 220), config=configs, seed=st.integers(0, 9))
def test_a_resident_set_is_sorted_unique_and_of_the_budget(
    scores: np.ndarray, policy: Policy, budget: int, config: SelectionConfig, seed: int
) -> None:
    n = len(scores)
    kept = select(
        scores,
        policy=policy,
        chunks=n,
        budget=budget,
        config=config,
        rng=np.random.default_rng(seed),
    )
    assert kept.dtype == np.int64
    assert (np.diff(kept) > 0).all()
    assert ((kept >= 0) & (kept < n)).all()
    assert len(kept) == (n if policy == "full" else min(budget, n))
    if len(kept) > 0:
        recency = min(len(kept), recency_chunks(budget, config))
        assert set(range(n - recency, n)) <= set(kept)
        assert set(range(min(config.sink_chunks, len(kept) - recency))) <= set(kept)


@given(scores=scored(), budget=st.integers(1, 220), config=configs)
def test_lookahead_keeps_the_largest_scores_and_of_equal_ones_the_newer(
    scores: np.ndarray, budget: int, config: SelectionConfig
) -> None:
    n = len(scores)
    kept = set(select(scores, policy="lookahead", chunks=n, budget=budget, config=config).tolist())
    recency = recency_chunks(budget, config)
    sinks = min(config.sink_chunks, max(0, budget - recency))
    middle = range(sinks, n - recency)
    inside = [(scores[chunk], chunk) for chunk in middle if chunk in kept]
    outside = [(scores[chunk], chunk) for chunk in middle if chunk not in kept]
    assert not inside or not outside or min(inside) > max(outside)


def test_recency_is_the_sinks_and_the_end() -> None:
    kept = select(None, policy="recency", chunks=100, budget=10, config=SelectionConfig())
    assert kept.tolist() == [0, *range(91, 100)]


def test_random_is_a_function_of_its_generator_and_reaches_every_chunk() -> None:
    def draw(seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        kept = select(None, policy="random", chunks=40, budget=10, config=SelectionConfig(), rng=rng)
        return [int(chunk) for chunk in kept]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert set().union(*(draw(seed) for seed in range(60))) == set(range(40))


@pytest.mark.parametrize(
    ("policy", "scores", "message"),
    [
        ("lookahead", None, "one score for each of 20 chunks"),
        ("lookahead", np.zeros(19, np.float32), "one score for each of 20 chunks"),
        ("lookahead", np.full(20, np.nan, np.float32), "NaN"),
        ("random", None, "generator"),
    ],
)
def test_what_a_policy_lacks_is_named(policy: Policy, scores: np.ndarray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(scores, policy=policy, chunks=20, budget=10, config=SelectionConfig())
