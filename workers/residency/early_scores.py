"""Scores of a sequence's first window: what one of its predictions wanted stays wanted."""

import numpy as np
import numpy.typing as npt

from forecache.workers.core.sequence import TokenSequence


class EarlyScores:
    """Largest score of each chunk at the boundaries of the first window, of each sequence in one.

    An answer's first tokens need in turn what the question needs at once: a chunk that one prediction leaves out,
    between two that want it, would be gone when it is read. With SmolLM2-135M over 16K tokens, links of a chain were:
    22 % right against 41 with full attention. Later predictions stand alone, as what a text needs moves on.
    """

    def __init__(self) -> None:
        self._largest: dict[TokenSequence, npt.NDArray[np.float32]] = {}

    def largest(
        self, seq: TokenSequence, scores: npt.NDArray[np.float32], boundary: int, window_steps: int
    ) -> npt.NDArray[np.float32]:
        """``scores``, float32 [chunks], predicted for ``boundary`` of ``seq``; within its first window the largest so
        far. Chunks are never fewer than at the boundary before."""
        before = self._largest.pop(seq, None)
        if boundary > window_steps:
            return scores
        if before is not None:
            scores = scores.copy()
            scores[: len(before)] = np.maximum(scores[: len(before)], before)
        self._largest[seq] = scores
        return scores

    def forget(self, seq: TokenSequence) -> None:
        """``seq`` leaves, or starts over."""
        self._largest.pop(seq, None)
