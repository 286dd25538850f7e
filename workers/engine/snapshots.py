"""Stores snapshots of per-sequence state in cold memory and loads them; most models have no such state."""

import logging
from collections.abc import Sequence

from forecache.workers.core.sequence import Chunk, TokenSequence
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.hot.prefetcher import Prefetcher
from forecache.workers.memory.hot.snapshot_store import SnapshotStore
from forecache.workers.models.step.runner import Runner

logger = logging.getLogger(__name__)


def state_layout(runner: Runner, piece_nbytes: int, snapshot_chunks: int) -> SnapshotStore | None:
    """How a snapshot is cut into pieces of ``piece_nbytes``, one every ``snapshot_chunks``; ``None``: no state."""
    if not runner.snapshot_nbytes:
        return None
    return SnapshotStore(-(-runner.snapshot_nbytes // piece_nbytes), max(snapshot_chunks, 1))


class Snapshots:
    """Snapshots of the sequences of one runner; ``layout`` is ``None`` if its model has no per-sequence state."""

    def __init__(self, runner: Runner, layout: SnapshotStore | None, prefetcher: Prefetcher, arena: Arena) -> None:
        self._runner = runner
        self.layout = layout
        self._prefetcher = prefetcher
        self._arena = arena

    def slots(self, seq: TokenSequence) -> int:
        """Cold slots that snapshots of ``seq`` may take; 0: there is no room, so none are stored."""
        if self.layout is None:
            return 0
        slots = self.layout.slots(seq.max_chunks)
        return slots if seq.max_chunks + slots <= self._arena.slots else 0

    def completed(self, seq: TokenSequence, chunk: Chunk) -> None:
        """Store the state after ``chunk`` of ``seq``, which is complete, if a snapshot is due there."""
        if self.layout is not None and seq.state_slots and (chunk.number + 1) % self.layout.every_chunks == 0:
            self._store(seq, chunk)

    def ended(self, seq: TokenSequence) -> list[ChunkKey]:
        """Store the state after the last chunk of ``seq``, where its session continues.

        Returns the keys of the snapshot's pieces; none if the runner no longer has that state.
        """
        if self.layout is None or not seq.chunks or not seq.state_slots:
            return []
        return self._store(seq, seq.chunks[-1])

    def resume(self, seq: TokenSequence, state: Sequence[SlotRef]) -> None:
        """Load the snapshot whose pieces are at ``state``, so that ``seq`` continues after the chunks that were found.

        If a piece or a chunk is damaged, ``seq`` loses its chunks and is computed from the start.
        """
        if self.layout is None or not seq.chunks:
            return
        snapshot = self.layout.load(self._arena, seq.chunks[-1].key, state)
        damaged = [] if snapshot is not None else [*zip(self.layout.keys(seq.chunks[-1].key), state, strict=True)]
        if snapshot is not None:
            self._runner.resume(seq, snapshot)
        # check after reading: a slot that is checked before could be reused before it is read
        cold = [(chunk.key, chunk.ref) for chunk in seq.chunks if chunk.ref is not None]
        damaged += [(key, ref) for key, ref in cold if not self._arena.check(ref, key)]
        if not damaged:
            return
        self._runner.forget(seq)
        logger.warning("%s is computed from the start: %d stored pieces are damaged", seq.request_id, len(damaged))
        for key, ref in damaged:
            self._prefetcher.drop(key, ref)
        seq.drop_chunks()

    def _store(self, seq: TokenSequence, chunk: Chunk) -> list[ChunkKey]:
        """Store the state of ``seq`` after ``chunk``, if the runner has it; returns the keys of the pieces."""
        assert self.layout is not None
        snapshot = self._runner.snapshot(seq, (chunk.number + 1) * seq.chunk_tokens)
        if snapshot is None:
            return []
        self._prefetcher.store_state(self.layout, seq.holder, chunk.key, snapshot)
        return self.layout.keys(chunk.key)
