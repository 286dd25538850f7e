"""What the engine asks of the code that runs a model's steps."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Plan
from forecache.workers.errors import ChunkLostError
from forecache.workers.models.step.in_flight_step import RunningStep


class StepAbortedError(Exception):
    """A sequence of the running step was cancelled; what the step has computed so far is void."""


class PastLostError(ChunkLostError):
    """Chunks of the past of ``request_id`` can't be read any more: the step is void, and that request restarts."""

    def __init__(self, message: str, request_id: str) -> None:
        super().__init__(message)
        self.request_id = request_id


class Runner(Protocol):
    """Computes plans. Chunks are written into the slots that their sequences hold; what a sequence keeps beside its
    chunks is the runner's own, and where there is such a state, :meth:`snapshot` and :meth:`resume` carry it over."""

    @property
    def snapshot_nbytes(self) -> int:
        """Bytes of a sequence's state beside its chunks; 0: chunks are all there is."""
        ...

    def launch(self, plan: Plan, aborted: Callable[[], bool] = ...) -> RunningStep:
        """Compute ``plan``, or raise :class:`StepAbortedError`; what is computed twice is written twice."""
        ...

    def warm_up(self, *, max_batch_size: int, max_chunks: int, cuda_graphs: bool | None, torch_compile: bool) -> None:
        """On a GPU, before the first request."""
        ...

    def index_record(self, slot: int) -> Tensor:
        """What the indexer scores of the completed chunk in ``slot``: uint8 [spec.nbytes]. Called by another thread."""
        ...

    def snapshot(self, seq: TokenSequence, stop: int) -> Tensor | None:
        """The state of ``seq`` behind its token ``stop - 1``, where a chunk ends: uint8, if it was kept."""
        ...

    def resume(self, seq: TokenSequence, snapshot: Tensor) -> None:
        """``seq``, whose chunks are known and of which nothing is computed, goes on behind them."""
        ...

    def wipe(self, seq: TokenSequence) -> None:
        """What the last step computed of ``seq`` is not finite: leave nothing of that beside its chunks. It is
        forgotten next."""
        ...

    def forget(self, seq: TokenSequence) -> None:
        """``seq`` left, or starts over."""
        ...

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` when what is kept of sequences contradicts itself."""
        ...


class Stateless:
    """The methods of :class:`Runner` for models whose sequences store everything in chunks."""

    snapshot_nbytes = 0

    def snapshot(self, seq: TokenSequence, stop: int) -> Tensor | None:
        """There is no state to save."""
        return None

    def resume(self, seq: TokenSequence, snapshot: Tensor) -> None:
        """Chunks are enough to continue."""

    def wipe(self, seq: TokenSequence) -> None:
        """Chunks are wiped by the engine."""
