"""States of sequences beside their chunks, to cold memory and back; nothing to do where chunks are all there is."""

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
    """How snapshots of the runner's states lie in slots of ``piece_nbytes``; None: it has no states."""
    if not runner.snapshot_nbytes:
        return None
    return SnapshotStore(-(-runner.snapshot_nbytes // piece_nbytes), max(snapshot_chunks, 1))


class Snapshots:
    """``layout`` is that of the runner's snapshots; None: it has none."""

    def __init__(self, runner: Runner, layout: SnapshotStore | None, prefetcher: Prefetcher, arena: Arena) -> None:
        self._runner = runner
        self.layout = layout
        self._prefetcher = prefetcher
        self._arena = arena

    def slots(self, seq: TokenSequence) -> int:
        """Slots of cold memory that the snapshots of ``seq`` may take; 0: it gets none, since there is no room."""
        if self.layout is None:
            return 0
        slots = self.layout.slots(seq.max_chunks)
        return slots if seq.max_chunks + slots <= self._arena.slots else 0

    def completed(self, seq: TokenSequence, chunk: Chunk) -> None:
        """``chunk`` of ``seq`` is complete: store the state behind it, where everybody may want to go on from it."""
        if self.layout is not None and seq.state_slots and (chunk.number + 1) % self.layout.every_chunks == 0:
            self._store(seq, chunk)

    def ended(self, seq: TokenSequence) -> list[ChunkKey]:
        """The session of ``seq`` will go on behind its last chunk: store that state; keys to keep for it, none where
        that state was not kept."""
        if self.layout is None or not seq.chunks or not seq.state_slots:
            return []
        return self._store(seq, seq.chunks[-1])

    def resume(self, seq: TokenSequence, state: Sequence[SlotRef]) -> None:
        """Go on with ``seq`` behind the chunks that were found, with the ``state`` found behind them; if that can't be
        done, ``seq`` has no chunks any more."""
        if self.layout is None or not seq.chunks:
            return
        snapshot = self.layout.load(self._arena, seq.chunks[-1].key, state)
        damaged = [] if snapshot is not None else [*zip(self.layout.keys(seq.chunks[-1].key), state, strict=True)]
        if snapshot is not None:
            self._runner.resume(seq, snapshot)
        # after what is read of them: before, a place could still be given away
        cold = [(chunk.key, chunk.ref) for chunk in seq.chunks if chunk.ref is not None]
        damaged += [(key, ref) for key, ref in cold if not self._arena.check(ref, key)]
        if not damaged:
            return
        self._runner.forget(seq)
        logger.warning("%s can't go on from what is stored: %d pieces are damaged", seq.request_id, len(damaged))
        for key, ref in damaged:
            self._prefetcher.drop(key, ref)
        seq.drop_chunks()

    def _store(self, seq: TokenSequence, chunk: Chunk) -> list[ChunkKey]:
        """Store the state of ``seq`` behind ``chunk``, if the runner has it; under which keys."""
        assert self.layout is not None
        snapshot = self._runner.snapshot(seq, (chunk.number + 1) * seq.chunk_tokens)
        if snapshot is None:
            return []
        self._prefetcher.store_state(self.layout, seq.holder, chunk.key, snapshot)
        return self.layout.keys(chunk.key)
