"""Places for chunks that are about to be stored, where what is stored already counts only if its bytes are right.

A correct copy must not give way to a damaged one: nobody would have the chunk any more.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from forecache.workers.errors import ChunkLostError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import Reservation, SlotRef

TRIES = 3
"""So often a place is asked for while others store damaged chunks of the same key."""

Reserve = Callable[[Sequence[ChunkKey]], list[Reservation]]


class Dropping(Protocol):
    """What is needed of `ColdMemory`, or of an `ArenaStore`."""

    @property
    def arena(self) -> Arena: ...

    def drop(self, key: ChunkKey, ref: SlotRef) -> None: ...


def reserve_sound(memory: Dropping, reserve: Reserve, keys: Sequence[ChunkKey]) -> list[Reservation]:
    """What ``reserve`` gives for ``keys``; a stored chunk whose bytes are wrong is dropped, and its place asked for
    again. Reads the bytes of stored chunks, so call it in no thread that others wait for.

    Raises :class:`ChunkLostError` where that does not end, and what ``reserve`` raises.
    """
    places = reserve(keys)
    for _ in range(TRIES):
        damaged = [place.key for place in places if place.stored and not _kept(memory, place.key, place.ref)]
        if not damaged:
            return places
        again = {place.key: place for place in reserve(damaged)}
        places = [again.get(place.key, place) for place in places]
    raise ChunkLostError(f"what is stored of {len(damaged)} chunks was damaged {TRIES} times: write them again")


def _kept(memory: Dropping, key: ChunkKey, ref: SlotRef) -> bool:
    """Whether the chunk ``key`` at ``ref`` stays stored: it is sound, or its owner is not there to drop it. Whoever
    reads that one finds it damaged."""
    if memory.arena.check(ref, key):
        return True
    try:
        memory.drop(key, ref)
    except ChunkLostError:
        return True
    return False
