"""Requests to the Memory Indexer and its answers. Picklable, without Ray."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class StepState:
    """The decode step that a prediction starts from, for a trained indexer.

    ``position``: position of the token that the step read; ``steps``: steps of history that the queries come from,
    including this one; ``hidden``: float16 [target layers, hidden], the step's inputs of the query projections.
    """

    position: int
    steps: int
    hidden: npt.NDArray[np.float16]


@dataclass(frozen=True)
class PredictRequest:
    """Asks which of a sequence's completed chunks the next steps will need.

    Attributes:
        index_slots: int64 [chunks], the arena slot with each chunk's index record; -1 if the chunk is not in the arena.
        generations: int64 [chunks], the generations of these slots.
        queries: float32 [query_heads, head_dim], RoPE applied, in the order of the index spec's heads. For a trained
            indexer: those of :attr:`.lookahead.LookaheadScorer.spec`.
        local_lse: float32 [query_heads], log-sum-exp of each query's scaled logits over the tokens that its step saw
            outside completed chunks, which completes the softmax's denominator; -inf without such tokens.
        local_records: uint8 [chunks without a slot, record bytes], index records of those chunks, in order.
        state: the step, for a trained indexer only.
        weights: float32 [query_heads], weights of the queries, for records of kind "entries" only.
    """

    sequence_id: str
    arena_path: str
    index_slots: npt.NDArray[np.int64]
    generations: npt.NDArray[np.int64]
    queries: npt.NDArray[np.float32]
    local_lse: npt.NDArray[np.float32]
    local_records: npt.NDArray[np.uint8]
    state: StepState | None = None
    weights: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Prediction:
    """Scores of a sequence's chunks.

    ``scores``: float32 [chunks], larger is needed sooner. ``missing``: chunks whose index keys could not be read; they
    have the lowest score. ``event_mass``: float32 [chunks], mass of the retrieval events of the
    model's retrieval heads at the step of the queries (docs/architecture.md); ``None`` if these heads are unknown.
    """

    sequence_id: str
    scores: npt.NDArray[np.float32]
    missing: tuple[int, ...] = ()
    event_mass: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class IndexerStats:
    """Totals since the start; ``predict_s``: seconds spent scoring. ``waiting``: requests in the queue now."""

    predictions: int = 0
    failed_predictions: int = 0
    predict_s: float = 0.0
    waiting: int = 0


class Indexer(Protocol):
    """Scores chunks without blocking decode steps."""

    def predict(self, request: PredictRequest) -> Future[Prediction]: ...

    def close(self) -> None: ...
