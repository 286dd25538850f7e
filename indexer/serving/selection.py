"""Selects the resident set from scores. Pure functions of numpy arrays (docs/architecture.md)."""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from forecache.indexer.serving.config import SelectionConfig

LEAST_SCORED_CHUNKS = 4
"""Every budget leaves room for at least this many chunks selected by score."""


def recency_chunks(budget: int, config: SelectionConfig) -> int:
    """How many of ``budget`` chunks are reserved for the most recent ones: at least one, unless the fraction is 0."""
    return max(1, int(config.recency_fraction * budget)) if config.recency_fraction else 0


def budget_chunks(chunks: int, keep_ratio: float, config: SelectionConfig, least_chunks: int = 0) -> int:
    """Resident chunks of a sequence of ``chunks`` chunks.

    max(⌈keep_ratio·n⌉, sink + recency + 4, min_chunks, least_chunks), at most n; recency is itself a share of the
    budget.
    """
    budget = max(math.ceil(keep_ratio * chunks), config.min_chunks, least_chunks)
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

    The first ``sink_chunks`` and the most recent chunks are always kept, as far as the budget allows. ``policy`` fills
    the rest: "lookahead" takes the largest ``scores`` (float32 [chunks]; of equal scores the newer chunk), "recency"
    the newest chunks, "random" a uniform sample from ``rng``. "full" keeps every chunk and ignores the budget.

    Raises ValueError if ``scores`` are missing, of another shape or NaN, or if ``rng`` is missing.
    """
    if policy == "full" or budget >= chunks:
        return np.arange(chunks, dtype=np.int64)
    if budget <= 0:
        return np.empty(0, dtype=np.int64)
    # with room for one chunk, the newest takes precedence over the sinks
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
    """Indices of the ``count`` largest ``values``; of equal values the first. Linear time."""
    if count >= len(values):
        return np.arange(len(values))
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    least = np.partition(values, len(values) - count)[len(values) - count]
    larger = np.flatnonzero(values > least)
    return np.concatenate([larger, np.flatnonzero(values == least)[: count - len(larger)]])
