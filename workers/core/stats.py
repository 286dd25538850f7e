"""Numbers that a worker exposes; `cluster/observe/metrics.py` maps them to Prometheus metrics."""

from dataclasses import dataclass, field
from typing import Literal

from forecache.workers.memory.arena.stats import TierStats

ScorerName = Literal["trained", "training-free", "bounds"]

RECALL_BOUNDS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Upper bounds of the buckets of :attr:`EngineCounters.recall_buckets`, by a recall's duration."""


@dataclass
class EngineCounters:
    """Sums since start. The engine's thread adds to them; :class:`EngineStats` has a copy.

    Attributes:
        recall_buckets: recalls by duration, not cumulative; one bucket more than there are bounds.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    recalled_chunks: int = 0
    recall_bytes: int = 0
    recall_s: float = 0.0
    recall_buckets: tuple[int, ...] = (0,) * (len(RECALL_BOUNDS_S) + 1)
    written_back_chunks: int = 0
    written_back_bytes: int = 0
    write_back_s: float = 0.0
    windows: int = 0
    late_windows: int = 0
    failed_predictions: int = 0
    event_hits: int = 0
    event_misses: int = 0
    fallbacks: int = 0
    refused_fallbacks: int = 0
    lost_chunks: int = 0
    non_finite_steps: int = 0
    prefetch_stall_s: float = 0.0
    finished_requests: int = 0
    cancelled_requests: int = 0
    failed_requests: int = 0
    steps: int = 0
    step_s: float = 0.0


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of an engine's numbers. Chunks and slots are counts; other names end in their unit.

    Attributes:
        counters: a copy of the engine's counters.
        prefill_tokens_left: tokens left to prefill, of admitted prompts.
        prefilled_tokens, prefilled_prompts: computed by prefill since start, in steps that took ``prefill_s`` together
            and may include decode rows.
    """

    counters: EngineCounters = field(default_factory=EngineCounters)
    running: int = 0
    waiting: int = 0
    prefill_tokens_left: int = 0
    prefilled_tokens: int = 0
    prefilled_prompts: int = 0
    prefill_s: float = 0.0
    hot_slots: int = 0
    hot_slots_referenced: int = 0
    resident_ratio: float = 1.0


@dataclass(frozen=True)
class ScorerStats:
    """What scores chunks. ``digest`` names the weights of a trained indexer; ``fallbacks`` counts predictions that the
    worker made itself because its indexer actor did not answer."""

    name: ScorerName
    digest: str
    fallbacks: int


@dataclass(frozen=True)
class WorkerSizes:
    """Memory that a worker has: ``hot_bytes`` of its own pool, ``cold_bytes`` of its node's arena, which all workers of
    the node share, each with the tokens that it holds; ``batch_size``: most sequences decoded together."""

    hot_bytes: int
    hot_tokens: int
    cold_bytes: int
    cold_tokens: int
    batch_size: int

    def __str__(self) -> str:
        return (
            f"hot pool {self.hot_bytes / 2**30:.2f} GiB ({self.hot_tokens} tokens), "
            f"cold memory {self.cold_bytes / 2**30:.2f} GiB per node ({self.cold_tokens} tokens), "
            f"batches of up to {self.batch_size}"
        )


@dataclass(frozen=True)
class WorkerStats:
    """One worker's numbers; ``tier`` is ``None`` if its memory tier does not answer."""

    worker_id: str
    node_id: str
    engine: EngineStats
    tier: TierStats | None
    scorer: ScorerStats
