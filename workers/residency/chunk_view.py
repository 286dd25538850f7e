"""Where a running request's chunks are now, for people who watch it."""

from forecache.workers.core.requests import ChunkView
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.residency.pending_set import Turn

ATTENDED, HOT, PREFETCHING, PREDICTED, COLD, TO_COME = "ahfpc."
"""In the resident set, and looked at by a retrieval head when that was last measured; in it; on its way to the next
one; there for the next one already; in none of both; not computed yet."""


def chunk_view(seq: TokenSequence, pool: HotPool, turn: Turn | None) -> ChunkView | None:
    """What has changed since it was last asked for; ``None``: nothing, or nobody watches. ``turn`` is the set in the
    making. While a prompt is prefilled there is no set: what the pool holds is hot then."""
    if not seq.request.show_chunks:
        return None
    turned = None if turn is None else (turn.boundary, turn.selected is None, turn.ready)
    now = (seq.state, seq.table_version, len(seq.chunks), turned, seq.attended)
    if now == seq.shown:
        return None
    seq.shown = now
    counters = seq.counters
    coverage = counters.coverage_sum / counters.coverages if counters.coverages else None
    if seq.state in (State.RECALLING, State.DECODE, State.FINISHED):
        return ChunkView(_decoding(seq, turn), seq.resident_share, coverage)
    done = "".join(HOT if pool.lookup(chunk.key) is not None else COLD for chunk in seq.chunks)
    all_chunks = -(-seq.prefill_target // seq.chunk_tokens)
    return ChunkView(done + TO_COME * max(all_chunks - len(done), 0), 1.0, coverage)


def _decoding(seq: TokenSequence, turn: Turn | None) -> str:
    if seq.streamed:
        return HOT * (len(seq.chunks) + 1)
    states = [COLD] * len(seq.chunks)
    if turn is not None and turn.selected is not None:
        for number in turn.selected:
            states[number] = PREDICTED if turn.ready else PREFETCHING
    for number in seq.resident:
        states[number] = ATTENDED if number in seq.attended else HOT
    return "".join(states) + HOT  # the open chunk is always read
