"""From scores to a resident set. Pure functions of numpy arrays (docs/architecture.md)."""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from forecache.indexer.serving.config import SelectionConfig

LEAST_SCORED_CHUNKS = 4
"""A budget always leaves room for this many chunks that only their score brings in."""


def recency_chunks(budget: int, config: SelectionConfig) -> int:
    """How many of ``budget`` chunks go to the last ones: a share of it, at least one; none if the share is 0."""
    return max(1, int(config.recency_fraction * budget)) if config.recency_fraction else 0


def budget_chunks(chunks: int, keep_ratio: float, config: SelectionConfig) -> int:
    """Resident chunks of a sequence of ``chunks`` chunks.

    max(⌈keep_ratio·n⌉, sink + recency + 4, min_chunks), at most n; recency is itself a share of the budget.
    """
    budget = max(math.ceil(keep_ratio * chunks), config.min_chunks)
    while budget < chunks and budget - recency_chunks(budget, config) < config.sink_chunks + LEAST_SCORED_CHUNKS:
        budget += 1
    return min(chunks, budget)


def select(
    scores: npt.NDArray[np.float32] | None,
    *,
    policy: Literal["lookahead", "recency", "random", "full"],
    chunks: int,
    budget: int,
    config: SelectionConfig,
    rng: np.random.Generator | None = None,
) -> npt.NDArray[np.int64]:
    """Ids of the chunks to keep, ascending: int64 [min(budget, chunks)].

    The first ``sink_chunks`` and the last few are always kept, as far as the budget goes. The rest is filled
    by ``policy``: lookahead takes the largest ``scores`` (float32 [chunks]; of equal ones the newer), recency
    the newest, random a uniform sample drawn from ``rng``; full keeps every chunk, whatever the budget.
    """
    if policy == "full" or budget >= chunks:
        return np.arange(chunks, dtype=np.int64)
    if budget <= 0:
        return np.empty(0, dtype=np.int64)
    # the newest chunk goes before the sinks when there is room for one only
    recency = min(recency_chunks(budget, config), budget)
    sinks = min(config.sink_chunks, budget - recency)
    candidates = np.arange(sinks, chunks - recency, dtype=np.int64)
    room = budget - sinks - recency
    if policy == "lookahead":
        if scores is None or scores.shape != (chunks,):
            got = None if scores is None else scores.shape
            raise ValueError(f"lookahead needs one score for each of {chunks} chunks, got {got}")
        if np.isnan(scores).any():
            raise ValueError("a score is NaN")
        newest_first = candidates[::-1]
        chosen = newest_first[_largest(scores[newest_first], room)]
    elif policy == "recency":
        chosen = candidates[len(candidates) - room :]
    else:
        if rng is None:
            raise ValueError("the random policy needs a generator")
        chosen = rng.choice(candidates, room, replace=False)
    kept = np.concatenate([np.arange(sinks), chosen, np.arange(chunks - recency, chunks)])
    return np.sort(kept).astype(np.int64)


def _largest(values: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Where the ``count`` largest of ``values`` are, of equal ones the first; in linear time."""
    if count >= len(values):
        return np.arange(len(values))
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    least = np.partition(values, len(values) - count)[len(values) - count]
    larger = np.flatnonzero(values > least)
    return np.concatenate([larger, np.flatnonzero(values == least)[: count - len(larger)]])
