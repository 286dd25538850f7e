"""Where a running request's chunks are, for clients that watch it (``/ui``)."""

from forecache.workers.core.requests import ChunkView
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.memory.hot.pool import HotPool

ATTENDED, HOT, PREFETCHING, PREDICTED, COLD, TO_COME = "ahfpc."
"""Resident, and a retrieval head attended to it when that was last measured; resident; being copied for the next set;
copied for the next set; neither resident nor in the next set; not computed yet."""


def chunk_view(seq: TokenSequence, pool: HotPool) -> ChunkView | None:
    """Where the chunks of ``seq`` are; ``None`` if nothing changed since the last call, or no client watches.

    During prefill there is no resident set; then chunks in the pool count as hot.
    """
    if not seq.request.show_chunks:
        return None
    residency = seq.residency
    pending = residency.pending
    turned = None if pending is None else (pending.boundary, pending.selected is None, pending.ready)
    now = (seq.state, residency.version, len(seq.chunks), turned, residency.attended)
    if now == residency.shown:
        return None
    residency.shown = now
    counters = seq.counters
    coverage = counters.coverage_sum / counters.coverages if counters.coverages else None
    if seq.state in (State.RECALLING, State.DECODE, State.FINISHED):
        return ChunkView(_decoding(seq), seq.resident_share, coverage)
    done = "".join(HOT if pool.lookup(chunk.key) is not None else COLD for chunk in seq.chunks)
    all_chunks = -(-seq.prefill_target // seq.chunk_tokens)
    return ChunkView(done + TO_COME * max(all_chunks - len(done), 0), 1.0, coverage)


def _decoding(seq: TokenSequence) -> str:
    residency = seq.residency
    if residency.streamed:
        return HOT * (len(seq.chunks) + 1)
    states = [COLD] * len(seq.chunks)
    pending = residency.pending
    if pending is not None and pending.selected is not None:
        for number in pending.selected:
            states[number] = PREDICTED if pending.ready else PREFETCHING
    for number in residency.slots:
        states[number] = ATTENDED if number in residency.attended else HOT
    return "".join(states) + HOT  # every step reads the open chunk
