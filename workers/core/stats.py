"""Numbers the engine exposes; `cluster/observe/metrics.py` alone maps them to Prometheus."""

from dataclasses import dataclass
from typing import Literal

from forecache.workers.memory.arena.stats import TierStats

ScorerName = Literal["trained", "training-free", "bounds"]

RECALL_BOUNDS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Upper bounds of the buckets in which :attr:`EngineStats.recall_buckets` counts recalls by their time."""


@dataclass(frozen=True)
class EngineStats:
    """Gauges are of now, counters since start. Chunks and slots are counts, the rest has its unit in its name.

    ``prefill_tokens_left``: of prompts that are being prefilled; ``prefilled_tokens`` took ``prefill_s``, in steps that
    may have decoded too, and end ``prefilled_prompts``. ``recall_buckets``: recalls by their time, not cumulated, one
    more than there are bounds.
    """

    running: int = 0
    waiting: int = 0
    prefill_tokens_left: int = 0
    hot_slots: int = 0
    hot_slots_used: int = 0
    hot_slots_referenced: int = 0
    chunk_bytes: int = 0
    resident_ratio: float = 1.0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    prefilled_prompts: int = 0
    prefill_s: float = 0.0
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
    evicted_chunks: int = 0
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
class ScorerStats:
    """What scores chunks: "trained", "training-free" or "bounds"; ``digest`` names a trained indexer. ``fallbacks``:
    predictions that this worker made itself since its indexer actor did not answer."""

    name: ScorerName
    digest: str
    fallbacks: int


@dataclass(frozen=True)
class WorkerStats:
    """One worker's numbers; ``tier`` is None when its memory tier does not answer."""

    worker_id: str
    node_id: str
    engine: EngineStats
    tier: TierStats | None
    scorer: ScorerStats
