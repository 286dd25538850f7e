"""What one sequence reads from the hot pool, and where it stands in the window cycle."""

from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from forecache.indexer.serving.protocol import Prediction
from forecache.workers.memory.hot.completions import RecallItem

FIRST_BOUNDARY = 2
"""Decode steps before the first swap: the first step yields the answer's first queries, the second hides the copies."""


@dataclass
class PendingSet:
    """The next resident set of a sequence, until it takes over.

    It goes through three stages: a prediction is awaited (``future``); the chosen chunks wait for free pool slots
    (``wanted``); their copies run (``ticket``).

    Attributes:
        boundary: the decode step at which it takes over; 0 for the first set.
        chunks: the set is chosen from the sequence's first ``chunks`` chunks.
        resident: bool [chunks], what the step read whose queries the prediction uses.
        urgent: take over as soon as the copies are done, before the boundary.
        future: the prediction that is awaited.
        selected: the chosen chunks.
        wanted: chosen chunks that the current set lacks and that have no slot yet, the highest score first.
        incoming: chunk number → hot slot of those that have one; each slot is referenced in the pool.
        copying: the recalls that fill slots of ``incoming``.
        ticket: identifies the recall that runs.
    """

    boundary: int
    chunks: int
    resident: npt.NDArray[np.bool_] | None = None
    urgent: bool = False
    future: Future[Prediction] | None = None
    selected: frozenset[int] | None = None
    incoming: dict[int, int] = field(default_factory=dict)
    copying: list[RecallItem] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    ticket: int | None = None

    @property
    def ready(self) -> bool:
        """Chosen and copied: it can take over."""
        return self.selected is not None and not self.wanted and self.ticket is None


@dataclass
class Residency:
    """Which chunks one sequence reads, what it may occupy in the hot pool, and its next resident set.

    A sequence gets a new one each time it starts over.

    Attributes:
        slots: chunk number → hot slot of the resident set; each slot is referenced in the pool.
        version: grows with every change of ``slots`` or of the open chunk's slot.
        streamed: no resident set; each step attends to all chunks, wherever they are stored.
        reserved_slots: hot slots that are reserved for the sequence.
        decode_steps: decode steps that were launched.
        widening: factor by which fallback has multiplied the first budget.
        half_set: bool [chunks], what the last set would have been with half the budget.
        steady_boundaries: boundaries in a row at which that half would have covered enough.
        attended: resident chunks that retrieval heads attended to when that was last measured.
        boundary: the decode step at which the next set takes over.
        awaited_boundary: the boundary whose queries a step in flight will bring.
        waiting_since_s: ``time.perf_counter`` when the sequence began to wait for a late set.
        pending: the next set, once its prediction was requested.
        shown: what the client was last shown, see :mod:`forecache.workers.residency.chunk_view`.
    """

    version: int = 0
    slots: dict[int, int] = field(default_factory=dict)
    streamed: bool = False
    reserved_slots: int = 0
    decode_steps: int = 0
    widening: int = 1
    half_set: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    steady_boundaries: int = 0
    attended: frozenset[int] = frozenset()
    boundary: int = FIRST_BOUNDARY
    awaited_boundary: int | None = None
    waiting_since_s: float | None = None
    pending: PendingSet | None = None
    shown: tuple[object, ...] = ()
    early_scores: npt.NDArray[np.float32] | None = None

    @property
    def copying(self) -> bool:
        """Whether a copy into slots of the pending set runs: the slots can't be released yet."""
        return self.pending is not None and self.pending.ticket is not None

    @property
    def incoming_slots(self) -> list[int]:
        """Hot slots that the pending set references."""
        return [] if self.pending is None else list(self.pending.incoming.values())

    def share(self, chunks: int) -> float:
        """Resident / all chunks of a sequence with ``chunks`` completed ones; the open chunk counts on both sides."""
        return 1.0 if self.streamed else (len(self.slots) + 1) / (chunks + 1)

    def keep_early_scores(
        self, scores: npt.NDArray[np.float32], boundary: int, window_steps: int
    ) -> npt.NDArray[np.float32]:
        """The scores that choose the set at ``boundary``: within the first window the largest so far, later ``scores``.

        Early tokens use facts one at a time, so a chunk that scored highly once stays in the set. Measured with
        SmolLM2-135M over 16K tokens: 22 % of the links of a chain were right without this, against 41 % with full
        attention. Later in an answer the needed chunks move on, so predictions stand alone.

        Args:
            scores: float32 [chunks]; never fewer chunks than at the boundary before.
            boundary: in decode steps.
            window_steps: decode steps of a window.
        """
        before, self.early_scores = self.early_scores, None
        if boundary > window_steps:
            return scores
        if before is not None:
            scores = scores.copy()
            scores[: len(before)] = np.maximum(scores[: len(before)], before)
        self.early_scores = scores
        return scores

    def drop_pending(self) -> PendingSet | None:
        """Leave the window cycle; returns the pending set, whose slots the caller releases."""
        pending, self.pending = self.pending, None
        self.awaited_boundary = self.waiting_since_s = self.early_scores = None
        return pending
