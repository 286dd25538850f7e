"""What a prediction needs of the coming decode step: which chunks there are, and where their keys lie."""

import numpy as np

from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Capture
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.residency.budgets import mask_of


def make_capture(row: int, seq: TokenSequence, boundary: int, pool: HotPool, history_steps: int) -> Capture:
    """For the turn of ``seq`` at ``boundary``; it is row ``row`` of the step. Queries of ``history_steps`` steps, the
    newest included, are wanted."""
    ref_slots, generations = (array.copy() for array in seq.refs())
    resident = mask_of(list(seq.resident), len(seq.chunks))
    local = []
    for number in np.flatnonzero(ref_slots < 0).tolist():
        hot = seq.held_back.get(number)
        if hot is None:
            hot = pool.lookup(seq.chunks[number].key)
        assert hot is not None, f"chunk {number} of {seq.request_id} is neither hot nor in the arena"
        local.append(hot)
    recent = _recent_slots(seq, pool, history_steps)
    if seq.tail_tokens + 1 == seq.chunk_tokens:
        # this step completes a chunk, which it reads
        local.append(recent[-1])
        ref_slots, generations = np.append(ref_slots, -1), np.append(generations, 0)
        resident = np.append(resident, True)
    return Capture(
        row,
        seq,
        restarts=seq.restarts,
        boundary=boundary,
        position=seq.num_computed,
        recent_slots=recent,
        first_recent=len(seq.chunks) + 1 - len(recent),
        local_slots=tuple(local),
        ref_slots=ref_slots,
        generations=generations,
        resident=resident,
    )


def _recent_slots(seq: TokenSequence, pool: HotPool, history_steps: int) -> tuple[int, ...]:
    """Slots of the open chunk, and before it of those that were open within the history, as far as they are hot."""
    oldest = max(seq.num_computed - history_steps + 2, 0) // seq.chunk_tokens
    slots = [seq.open_slots[len(seq.chunks)]]
    for chunk in reversed(seq.chunks[oldest:]):
        slot = seq.resident.get(chunk.number, seq.held_back.get(chunk.number))
        if slot is None:
            slot = pool.lookup(chunk.key)
        if slot is None:
            break
        slots.insert(0, slot)
    return tuple(slots)
