"""Counts what the engine did, for all requests and for each."""

import itertools
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import replace

from forecache.workers.core.requests import FinishReason, SequenceStats
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.core.stats import RECALL_BOUNDS_S, EngineCounters, EngineStats
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


def count_recall(counters: EngineCounters, done: Recalled) -> None:
    """Add a recall to ``counters``."""
    counters.recalled_chunks += done.recalled_chunks
    counters.recall_bytes += done.recalled_bytes
    counters.recall_s += done.duration_s
    at, counts = bisect_left(RECALL_BOUNDS_S, done.duration_s), counters.recall_buckets
    counters.recall_buckets = (*counts[:at], counts[at] + 1, *counts[at + 1 :])
    counters.lost_chunks += len(done.lost)


def count_end(counters: EngineCounters, seq: TokenSequence, reason: FinishReason) -> None:
    """Add a request that ended for ``reason`` to ``counters``."""
    counters.windows += seq.counters.windows
    counters.late_windows += seq.counters.late_windows
    counters.failed_predictions += seq.counters.failed_predictions
    counters.event_hits += seq.counters.event_hits
    counters.event_misses += seq.counters.event_misses
    counters.fallbacks += seq.counters.fallbacks
    counters.refused_fallbacks += seq.counters.refused_fallbacks
    if reason == "cancelled":
        counters.cancelled_requests += 1
    elif reason == "error":
        counters.failed_requests += 1
    else:
        counters.finished_requests += 1


def engine_stats(counters: EngineCounters, pool: HotPool, scheduler: Scheduler) -> EngineStats:
    """A snapshot of ``counters``, with gauges of ``pool`` and ``scheduler``."""
    running = list(scheduler.running)
    ratios = [seq.resident_share for seq in running if seq.residency.decode_steps]
    return EngineStats(
        running=len(running),
        waiting=len(scheduler.waiting),
        prefill_tokens_left=sum(seq.prefill_target - seq.num_computed for seq in running if seq.state is State.PREFILL),
        prefilled_tokens=scheduler.prefilled_tokens,
        prefilled_prompts=scheduler.prefilled_prompts,
        prefill_s=scheduler.prefill_s,
        hot_slots=pool.num_slots,
        hot_slots_referenced=pool.referenced,
        resident_ratio=sum(ratios) / len(ratios) if ratios else 1.0,
        counters=replace(counters),
    )
