"""What the engine asks of the Memory Indexer, and what it answers. Picklable, free of Ray."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class StepState:
    """What a trained indexer wants to know of the step that asks.

    ``position``: of the token that it read; ``steps``: how many steps of history the queries are made from, this one
    included; ``hidden``: float16 [target layers, hidden], inputs of its query projections.
    """

    position: int
    steps: int
    hidden: npt.NDArray[np.float16]


@dataclass(frozen=True)
class PredictRequest:
    """Which chunks will this sequence need next?

    ``index_slots``: int64 [chunks], the arena slot whose index record belongs to each completed chunk, in order; -1
    where the chunk has not reached the arena yet. ``local_records``: uint8 [chunks without a slot, record bytes], in
    order: index records that come along because no arena has them. ``generations``: int64 [chunks], the slots'
    generations. ``queries``: float32 [query_heads, head_dim], RoPE applied, in the order of the index spec's
    heads. ``local_lse``: float32 [query_heads], log-sum-exp of these queries' scaled logits over the tail's tokens, so
    that the softmax has its whole denominator (-inf where there are none). For a trained indexer queries and their
    log-sum-exps are those of :attr:`.lookahead.LookaheadScorer.spec`, each over what its own step saw; ``state`` goes
    with them. ``weights``: float32 [query_heads], of the queries where records are of kind "entries"; nothing else has
    any.
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
    """``scores``: float32 [chunks], larger is needed sooner; ``missing``: chunks whose index keys could not be read.
    Those score least.

    ``event_mass``: float32 [chunks], retrieval events of the model's own retrieval heads at the step of the queries,
    summed (docs/architecture.md); ``None`` where nobody knows these heads.
    """

    sequence_id: str
    scores: npt.NDArray[np.float32]
    missing: tuple[int, ...] = ()
    event_mass: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class IndexerStats:
    """Sums since start, but for ``waiting``: requests that are not begun. ``predict_s``: time spent scoring."""

    predictions: int = 0
    failed_predictions: int = 0
    predict_s: float = 0.0
    waiting: int = 0


class Indexer(Protocol):
    """Scores chunks off the critical path."""

    def predict(self, request: PredictRequest) -> Future[Prediction]: ...

    def close(self) -> None: ...
