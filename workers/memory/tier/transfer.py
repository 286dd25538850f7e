"""Copies chunks out of a store and into one."""

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
"""Slots that a chunk is written to, one after another, while they turn out to have bad memory."""


def read(store: ArenaStore, keys: Sequence[ChunkKey]) -> ChunkBatch:
    """Copies of those of ``keys`` that are stored. A chunk with wrong bytes is dropped from the store.

    Nothing is held, and a copy does not count as a use: chunks that move because they are the coldest stay the coldest.
    """
    mark = store.mark
    found = [(key, ref) for key, ref in zip(keys, store.find(keys), strict=True) if ref is not None]
    batch = store.arena.read([ref for _, ref in found], [key for key, _ in found])
    if len(batch) < len(found):
        sound = set(batch.keys)
        for key, ref in found:
            if key not in sound:
                store.drop(key, ref)  # does nothing if it was only evicted meanwhile
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
    """Store the chunks of ``batch``, in its order, while there is room; returns the keys that are stored now.

    ``holder``: holds them. ``copied_only``: evict only chunks that other stores answer for, and leave ``keep_room``
    slots available that way. ``cached``: other stores keep answering for the new ones. A chunk without the checksums
    that it came with is left out. Raises :class:`ReleasedError` when ``holder`` was released.
    """
    batch = batch.sound()
    # A separate holder: a release of `holder` in another thread must not free a slot that is being written.
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

    Raises :class:`OverloadedError` when there is no room, and :class:`ChunkLostError` when :data:`PLACES` slots in a
    row do not hold what was written to them.
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
            logger.warning("chunk %s is written to another slot: %s", key.hex(), error)
            store.drop(key, place.ref)
        else:
            store.commit(name, [(key, place.ref)], copied=cached)
            return
    raise ChunkLostError(f"chunk {key.hex()} was not stored: {PLACES} slots returned other bytes than were written")
