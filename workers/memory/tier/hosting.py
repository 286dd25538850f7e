"""What a tier does for sequences of other nodes: promises room, holds their chunks, and sends layers of them."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from forecache.workers.memory.arena.layer_digests import LayerDigests
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.chunk_batch import ChunkBatch, LayerBatch, RecordBatch
from forecache.workers.memory.format.hold_id import worker_of
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.tier.transfer import take_in


class HostedSequences:
    """Over the ``store`` of one tier. Holders have the names that they have on their own node.

    A call for a holder that was released raises :class:`ReleasedError`: it was on its way while the release overtook
    it, and nobody would release what it gets.
    """

    def __init__(
        self, store: ArenaStore, layout: ChunkLayout, from_disk: Callable[[str, Sequence[ChunkKey]], int]
    ) -> None:
        """``from_disk`` brings the first of some chunks, as far as they lie on disk, into the store, and holds them."""
        self._store = store
        self._layout = layout
        self._from_disk = from_disk
        self._digests = LayerDigests(store.arena, layout)

    def promise(self, holder: str, chunks: int) -> int:
        """Room for ``chunks`` in all, as far as there is; returns for how many."""
        return self._store.promise_up_to(holder, chunks)

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> RecordBatch:
        """Hold those of ``keys`` that are here and sound; returns their records, in order."""
        self._from_disk(holder, keys)
        held = [(key, ref) for key, ref in zip(keys, self._store.hold(holder, keys), strict=True) if ref is not None]
        batch = self._store.arena.read([ref for _, ref in held], [key for key, _ in held])
        sound = set(batch.keys)
        for key, ref in held:
            if key not in sound:
                self._store.drop(key, ref)
        return RecordBatch.of(batch)

    def take_in(self, holder: str, batch: ChunkBatch) -> list[ChunkKey]:
        """Store and hold ``batch`` as far as there is room; returns the keys that are held now."""
        return take_in(self._store, batch, holder)

    def read_layer(self, holder: str, keys: Sequence[ChunkKey], layer: int) -> LayerBatch:
        """One layer of those of ``keys`` that are here and sound; ``holder`` holds them, unless it was released
        meanwhile. Nothing is held by this."""
        found = [(key, ref) for key, ref in zip(keys, self._store.find(keys), strict=True) if ref is not None]
        arena, slots = self._store.arena, np.array([ref.slot for _, ref in found], np.int64)
        chunks = arena.chunks.numpy()
        rows = np.concatenate([chunks[slots, part] for part in self._layout.layer_parts(layer)], axis=1)
        sound = self._digests.sound([key for key, _ in found], [ref for _, ref in found], layer, rows)
        # a slot that was given away while it was read holds another chunk
        same = arena.generation(slots) == np.array([ref.generation for _, ref in found], np.uint64)
        for number in np.flatnonzero(~sound).tolist():
            self._store.drop(*found[number])
        kept = np.flatnonzero(sound & same)
        return LayerBatch.sealed(tuple(found[number][0] for number in kept.tolist()), rows[kept])

    def hosted(self, floors: Mapping[str, int]) -> list[str]:
        """Names of all holders of these workers of another node that hold something here; all serials of a worker
        below its floor are released."""
        for worker_id, floor in floors.items():
            self._store.forget_released(worker_id, floor)
        return [holder for holder in self._store.holders() if worker_of(holder) in floors]

    def release(self, holders: Sequence[str]) -> None:
        """Let go of all that these hold."""
        for holder in holders:
            self._store.release(holder)
