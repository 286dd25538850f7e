"""Chunks out of a store and into one, by value."""

import logging
import uuid
from collections.abc import Sequence
from dataclasses import replace

from forecache.workers.errors import ChunkLostError, OverloadedError
from forecache.workers.memory.arena.headers import OWNER
from forecache.workers.memory.arena.reserving import reserve_sound
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.chunk_batch import ChunkBatch
from forecache.workers.memory.format.keys import ChunkKey

logger = logging.getLogger(__name__)

PLACES = 3
"""Slots that a chunk is written to, one after another, while their memory proves to be bad."""


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


def store_batch(
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
    # Not in the holder's name: whoever releases it meanwhile, in another thread, does not free a slot that is written.
    name = f"transfer/{uuid.uuid4().hex}"
    taken: list[ChunkKey] = []
    try:
        for row, key in enumerate(batch.keys):
            if copied_only and store.room <= keep_room and store.stored([key]) == [False]:
                break
            try:
                _put(store, name, batch, row, copied_only=copied_only, cached=cached)
            except (OverloadedError, ChunkLostError):
                break
            if holder is not None:
                store.hold(holder, [key])
            taken.append(key)
        if not cached:
            store.set_copied(taken, False)
    finally:
        store.release(name)
    return taken


def _put(store: ArenaStore, name: str, batch: ChunkBatch, row: int, *, copied_only: bool, cached: bool) -> None:
    """Store one chunk, held for ``name``, unless it is stored already.

    Raises :class:`OverloadedError` where there is no room, and :class:`ChunkLostError` where :data:`PLACES` slots in
    turn do not hold what is written to them.
    """
    key = batch.keys[row]
    for _ in range(PLACES):
        [place] = reserve_sound(
            store, lambda keys: store.reserve_slots(name, keys, copied_only=copied_only, writer=OWNER), [key]
        )
        if place.stored:
            return
        try:
            store.arena.write(place.ref, batch, row)
        except ChunkLostError as error:
            logger.warning("chunk %s is written elsewhere: %s", key.hex(), error)
            store.drop(key, place.ref)
        else:
            store.commit(name, [(key, place.ref)], copied=cached)
            return
    raise ChunkLostError(f"chunk {key.hex()} was not stored: {PLACES} slots do not hold what is written to them")
