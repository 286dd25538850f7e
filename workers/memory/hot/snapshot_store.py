"""Snapshots of sequences' states in cold memory: cut into pieces of a chunk's size, under separate keys.

A piece is stored, held, evicted, moved and fetched like any chunk. Its key derives from the key of the chunk that the
snapshot follows. A lost snapshot costs the recomputation of the tokens since the one before.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from forecache.workers.errors import ChunkLostError, OverloadedError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.reserving import reserve_sound
from forecache.workers.memory.client.protocol import ColdMemory, HoldsChunks
from forecache.workers.memory.format.keys import ChunkKey, child_key
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.hot.copies import Mark

logger = logging.getLogger(__name__)

STATE_MARK = -1
"""Not a token id, so that no chunk has the key of a piece."""


@dataclass(frozen=True)
class SnapshotStore:
    """A snapshot has ``pieces`` pieces; one follows every ``every_chunks``-th chunk and is shared by all sequences."""

    pieces: int
    every_chunks: int

    def keys(self, chunk: ChunkKey) -> list[ChunkKey]:
        """Keys of the pieces of the snapshot behind ``chunk``."""
        return [child_key(chunk, [STATE_MARK, number]) for number in range(self.pieces)]

    def slots(self, chunks: int) -> int:
        """Most slots that the snapshots of a sequence of ``chunks`` chunks take."""
        return self.pieces * (chunks // self.every_chunks + 1)

    def cut_prefix(
        self,
        memory: HoldsChunks,
        holder: str,
        keys: Sequence[ChunkKey],
        refs: list[SlotRef],
        session_keys: tuple[ChunkKey, ...],
    ) -> tuple[list[SlotRef], tuple[ChunkKey, ...], Sequence[SlotRef]]:
        """Shorten a prefix at ``refs``, whose last chunks have ``session_keys``, to the last chunk with a snapshot.

        Returns the slots, the rest of ``session_keys``, and the slots of the snapshot's pieces.
        """
        exact = len(refs) - len(session_keys)
        try:
            count, state = self.find(memory, holder, [*keys[:exact], *session_keys]) if refs else (0, [])
        except ChunkLostError:
            return [], (), ()  # the memory tier is gone, and the prefix with it
        return refs[:count], session_keys[: max(count - exact, 0)], state

    def find(self, memory: HoldsChunks, holder: str, chunks: Sequence[ChunkKey]) -> tuple[int, list[SlotRef]]:
        """The longest run of ``chunks``, from the first, with a snapshot behind it, and the slots of its pieces, which
        are held for ``holder`` from now on. ``(0, [])``: there is none.

        Asks for the likely ones in one call; then, one by one, for those that other nodes may have.
        """
        last = len(chunks) // self.every_chunks * self.every_chunks
        aligned = range(last, 0, -self.every_chunks)
        near = list(range(len(chunks), last, -1)) + list(aligned[:1])
        held = memory.hold(holder, [key for count in near for key in self.keys(chunks[count - 1])])
        for number, count in enumerate(near):
            refs = [ref for ref in held[number * self.pieces : (number + 1) * self.pieces] if ref is not None]
            if len(refs) == self.pieces:
                return count, refs
        for count in [*near[:1], *aligned]:
            refs = memory.hold_prefix(holder, self.keys(chunks[count - 1]))
            if len(refs) == self.pieces:
                return count, refs
        return 0, []

    def store(
        self, memory: ColdMemory, holder: str, chunk: ChunkKey, snapshot: torch.Tensor, after: Mark = None
    ) -> None:
        """Store ``snapshot``, uint8 [n], of the state behind ``chunk``, held for ``holder``, once ``after`` is reached.
        Skips it when there is no room, or the memory is away."""
        if after is not None:
            after.synchronize()
        arena, keys = memory.arena, self.keys(chunk)
        padded = torch.zeros(self.pieces * arena.chunks.shape[1], dtype=torch.uint8)
        no_record = np.zeros(arena.index.shape[1], np.uint8)
        padded[: len(snapshot)] = snapshot.cpu()
        try:
            written = []
            places = reserve_sound(memory, lambda keys: memory.reserve_slots(holder, keys), keys)
            for key, place, piece in zip(keys, places, padded.chunk(self.pieces), strict=True):
                if not place.stored:
                    try:
                        arena.put(place.ref, key, piece.numpy(), no_record)
                    except ChunkLostError:
                        memory.drop(key, place.ref)  # so that the tier reuses the slot last, if at all
                        raise
                    written.append((key, place.ref))
            if written:
                memory.commit(holder, written)
        except (OverloadedError, ChunkLostError) as error:
            logger.warning("a snapshot of %s was not stored: %s", holder, error)

    def load(self, arena: Arena, chunk: ChunkKey, refs: Sequence[SlotRef]) -> torch.Tensor | None:
        """Read the snapshot behind ``chunk`` from its pieces at ``refs``, uint8 [n, and padding]; None: it is
        damaged."""
        snapshot = torch.cat([arena.chunks[ref.slot] for ref in refs])
        if not all(arena.check(ref, key) for ref, key in zip(refs, self.keys(chunk), strict=True)):
            return None
        return snapshot
