"""Counts what the engine did, for all requests and for each."""

import itertools
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from forecache.workers.core.requests import FinishReason, SequenceStats
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.core.stats import RECALL_BOUNDS_S, EngineStats
from forecache.workers.engine.scheduler import Scheduler
from forecache.workers.memory.hot.completions import Recalled
from forecache.workers.memory.hot.pool import HotPool


def sequence_stats(seq: TokenSequence, chunk_bytes: int) -> SequenceStats:
    """What a client learns about its request; ``chunk_bytes``: of a chunk in the hot pool."""
    counters = seq.counters
    chunks = len(seq.chunks) + 1
    resident = chunks if seq.residency.streamed else len(seq.residency.slots) + 1
    arrived, admitted = counters.arrived_s, counters.admitted_s
    return SequenceStats(
        prompt_tokens=seq.prompt_len,
        cached_tokens=counters.cached_tokens,
        completion_tokens=len(seq.output_ids),
        context_chunks=chunks,
        resident_chunks=resident,
        recalled_chunks=counters.recalled_chunks,
        late_windows=counters.late_windows,
        keep_ratio=counters.kept_sum / counters.kept_steps if counters.kept_steps else 1.0,
        coverage=counters.coverage_sum / counters.coverages if counters.coverages else None,
        fallbacks=counters.fallbacks,
        context_bytes=chunks * chunk_bytes,
        resident_bytes=resident * chunk_bytes,
        queue_s=0.0 if admitted is None else admitted - arrived,
        locate_s=counters.locate_s,
        time_to_first_token_s=0.0 if counters.first_token_s is None else counters.first_token_s - arrived,
    )


def check_references(pool: HotPool, sequences: Iterable[TokenSequence]) -> None:
    """Raise ``AssertionError`` if the pool's references are not exactly those of ``sequences``."""
    held: dict[int, int] = {}
    for seq in sequences:
        residency = seq.residency
        for slot in itertools.chain(residency.slots.values(), seq.open_slots.values(), residency.incoming_slots):
            held[slot] = held.get(slot, 0) + 1
    for slot in range(pool.num_slots):
        assert pool.references(slot) == held.get(slot, 0), (
            f"slot {slot} has {pool.references(slot)} references, sequences hold {held.get(slot, 0)}"
        )


@dataclass
class EngineCounters:
    """Sums since start, named as in :class:`EngineStats`. The engine's thread writes them, any may read a snapshot."""

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
    lost_chunks: int = 0
    non_finite_steps: int = 0
    windows: int = 0
    late_windows: int = 0
    failed_predictions: int = 0
    event_hits: int = 0
    event_misses: int = 0
    fallbacks: int = 0
    refused_fallbacks: int = 0
    prefetch_stall_s: float = 0.0
    finished_requests: int = 0
    cancelled_requests: int = 0
    failed_requests: int = 0
    steps: int = 0
    step_s: float = 0.0

    def step(self, duration_s: float) -> None:
        """Count a step."""
        self.steps += 1
        self.step_s += duration_s

    def recall(self, done: Recalled) -> None:
        """Count a recall."""
        self.recalled_chunks += done.recalled_chunks
        self.recall_bytes += done.recalled_bytes
        self.recall_s += done.duration_s
        at, counts = bisect_left(RECALL_BOUNDS_S, done.duration_s), self.recall_buckets
        self.recall_buckets = (*counts[:at], counts[at] + 1, *counts[at + 1 :])
        self.lost_chunks += len(done.lost)

    def leave(self, seq: TokenSequence, reason: FinishReason) -> None:
        """Count a request that ended for ``reason``."""
        self.windows += seq.counters.windows
        self.late_windows += seq.counters.late_windows
        self.failed_predictions += seq.counters.failed_predictions
        self.event_hits += seq.counters.event_hits
        self.event_misses += seq.counters.event_misses
        self.fallbacks += seq.counters.fallbacks
        self.refused_fallbacks += seq.counters.refused_fallbacks
        if reason == "cancelled":
            self.cancelled_requests += 1
        elif reason == "error":
            self.failed_requests += 1
        else:
            self.finished_requests += 1

    def snapshot(self, pool: HotPool, scheduler: Scheduler) -> EngineStats:
        """The counters, with gauges of ``pool`` and ``scheduler``."""
        running = list(scheduler.running)
        ratios = [seq.resident_share for seq in running if seq.residency.decode_steps]
        return EngineStats(
            running=len(running),
            waiting=len(scheduler.waiting),
            prefill_tokens_left=sum(
                seq.prefill_target - seq.num_computed for seq in running if seq.state is State.PREFILL
            ),
            prefilled_tokens=scheduler.prefilled_tokens,
            prefilled_prompts=scheduler.prefilled_prompts,
            prefill_s=scheduler.prefill_s,
            hot_slots=pool.num_slots,
            hot_slots_used=pool.used,
            hot_slots_referenced=pool.referenced,
            chunk_bytes=pool.layout.nbytes,
            resident_ratio=sum(ratios) / len(ratios) if ratios else 1.0,
            evicted_chunks=pool.evicted_chunks,
            **vars(self),
        )
