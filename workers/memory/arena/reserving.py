"""Reserve slots for chunks, and replace stored chunks whose bytes are wrong.

A correct copy at hand must not give way to a damaged stored one: the chunk would be lost.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from forecache.workers.errors import ChunkLostError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import Reservation, SlotRef

TRIES = 3
"""Attempts while others store damaged chunks of the same key again."""

Reserve = Callable[[Sequence[ChunkKey]], list[Reservation]]


class Dropping(Protocol):
    """The part of `ColdMemory`, or of an `ArenaStore`, that is needed here."""

    @property
    def arena(self) -> Arena: ...

    def drop(self, key: ChunkKey, ref: SlotRef) -> None: ...


def reserve_sound(memory: Dropping, reserve: Reserve, keys: Sequence[ChunkKey]) -> list[Reservation]:
    """What ``reserve`` returns for ``keys``, except that stored chunks with wrong bytes are dropped and reserved again.

    Reads the bytes of stored chunks, so call it in a thread on which no others wait. Raises :class:`ChunkLostError`
    when stored chunks are damaged :data:`TRIES` times, and what ``reserve`` raises.
    """
    places = reserve(keys)
    for _ in range(TRIES):
        damaged = [place.key for place in places if place.stored and not _kept(memory, place.key, place.ref)]
        if not damaged:
            return places
        again = {place.key: place for place in reserve(damaged)}
        places = [again.get(place.key, place) for place in places]
    raise ChunkLostError(f"{len(damaged)} stored chunks were damaged {TRIES} times in a row: write them again")


def _kept(memory: Dropping, key: ChunkKey, ref: SlotRef) -> bool:
    """Whether the chunk ``key`` at ``ref`` stays stored: it is sound, or its owner is away and can't drop it. Its
    readers find a damaged one themselves."""
    if memory.arena.check(ref, key):
        return True
    try:
        memory.drop(key, ref)
    except ChunkLostError:
        return True
    return False
