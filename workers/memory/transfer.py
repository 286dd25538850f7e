"""Chunks out of a store and into one, by value."""

import uuid
from collections.abc import Sequence
from dataclasses import replace

from forecache.workers.errors import ChunkLostError, OverloadedError, ReleasedError
from forecache.workers.memory.chunk_batch import ChunkBatch
from forecache.workers.memory.keys import ChunkKey
from forecache.workers.memory.reserving import reserve_sound
from forecache.workers.memory.store import ArenaStore


def read(store: ArenaStore, keys: Sequence[ChunkKey]) -> ChunkBatch:
    """Copies of those of ``keys`` that are stored. One whose bytes are wrong is dropped from the store.

    None is held, or counts as used: what is copied since it is the coldest stays the coldest.
    """
    mark = store.mark
    found = [(key, ref) for key, ref in zip(keys, store.find(keys), strict=True) if ref is not None]
    batch = store.arena.read([ref for _, ref in found], [key for key, _ in found])
    if len(batch) < len(found):
        sound = set(batch.keys)
        for key, ref in found:
            if key not in sound:
                store.drop(key, ref)  # nothing is, if it was only evicted meanwhile
    return replace(batch, mark=mark)


def take_in(
    store: ArenaStore,
    batch: ChunkBatch,
    holder: str | None = None,
    *,
    copied_only: bool = False,
    keep_room: int = 0,
    cached: bool = False,
) -> list[ChunkKey]:
    """Store chunks of ``batch``, in its order, while there is room; returns the keys that are stored now.

    They are held for ``holder`` if one is named. ``copied_only``: only chunks that others answer for may go for them,
    and ``keep_room`` slots must be left that can be had so. ``cached``: others go on to answer for those that are new
    here. Bytes that do not have the checksums they came with are not taken. Raises :class:`ReleasedError`
    when ``holder`` was released.
    """
    batch = batch.sound()
    name = holder or f"transfer/{uuid.uuid4().hex}"
    taken: list[ChunkKey] = []
    try:
        for row, key in enumerate(batch.keys):
            if copied_only and store.room <= keep_room and store.stored([key]) == [False]:
                break
            try:
                [place] = reserve_sound(store, lambda keys: store.reserve(name, keys, copied_only=copied_only), [key])
            except ReleasedError:
                raise  # it is held for nobody any more
            except (ChunkLostError, OverloadedError):
                break
            if not place.stored:
                store.arena.write(place.ref, batch, row)
                store.commit(name, [(key, place.ref)], copied=cached)
            taken.append(key)
        if not cached:
            store.set_copied(taken, False)
    finally:
        if holder is None:
            store.release(name)
    return taken
