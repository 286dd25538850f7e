"""What runners of models have in common whose sequences keep nothing beside their chunks."""

from torch import Tensor

from forecache.workers.core.sequence import TokenSequence


class Stateless:
    """The part of :class:`.runner.Runner` that carries states over, where there are none."""

    snapshot_nbytes = 0

    def snapshot(self, seq: TokenSequence, stop: int) -> Tensor | None:
        """There is nothing to take one of."""
        return None

    def resume(self, seq: TokenSequence, snapshot: Tensor) -> None:
        """Its chunks are enough."""

    def wipe(self, seq: TokenSequence) -> None:
        """It has nothing but chunks."""
