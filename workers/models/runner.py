"""What the engine asks of whoever runs a model's steps, and who that is for a given model.

A new architecture brings a runner of its own; see "A new architecture" in CONTRIBUTING.md.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from forecache.indexer.flashmemory.checkpoint import FlashMemoryIndexer
from forecache.indexer.records.index_spec import IndexSpec
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Plan
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.backbone import Backbone
from forecache.workers.models.deepseek_v4.runner import DeepseekV4Runner
from forecache.workers.models.dense.remote_past import FarPast
from forecache.workers.models.dense.runner import ModelRunner
from forecache.workers.models.dense.scorer import BesideModel
from forecache.workers.models.in_flight_step import RunningStep


class Runner(Protocol):
    """Computes plans. Chunks are written into the slots that their sequences hold; what a sequence keeps beside its
    chunks is the runner's own, and where there is such a state, :meth:`snapshot` and :meth:`resume` carry it over."""

    @property
    def snapshot_nbytes(self) -> int:
        """Bytes of a sequence's state beside its chunks; 0: chunks are all there is."""
        ...

    def launch(self, plan: Plan, aborted: Callable[[], bool] = ...) -> RunningStep:
        """Compute ``plan``, or raise :class:`.attention.StepAbortedError`; what is computed twice is written twice."""
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


def make_runner(
    backbone: Backbone,
    pool: HotPool,
    arena: Arena | None,
    spec: IndexSpec,
    max_rows: int = 1,
    cold_layout: ChunkLayout | None = None,
    beside: BesideModel | None = None,
    snapshot_tokens: int = 4096,
    far: FarPast | None = None,
) -> Runner:
    """The runner of ``backbone``; for what the arguments mean see :class:`.model_runner.ModelRunner`."""
    if backbone.v4 is not None:
        assert beside is None or isinstance(beside, FlashMemoryIndexer), "retrievers of another architecture"
        return DeepseekV4Runner(
            backbone, pool, arena, spec, max_rows=max_rows, retriever=beside, snapshot_tokens=snapshot_tokens
        )
    assert not isinstance(beside, FlashMemoryIndexer), "retrievers of another architecture"
    return ModelRunner(backbone, pool, arena, spec, max_rows, cold_layout, beside, far)
