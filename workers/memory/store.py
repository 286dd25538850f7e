"""Which chunk lies where in an arena, who holds it, and what may be evicted."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from forecache.workers.errors import ChunkLostError, OverloadedError
from forecache.workers.memory.arena import Arena
from forecache.workers.memory.headers import SEALED
from forecache.workers.memory.keys import ChunkKey
from forecache.workers.memory.protocol import Reservation, SlotRef, TierStats

Listener = Callable[[ChunkKey, bool], None]
"""Called with (key, True) when a chunk is stored, (key, False) when it is gone. Under the lock: be quick."""


class ArenaStore:
    """The owner's side of an arena: `ColdMemory` in-process, safe to call from any thread.

    A slot is in one of three places: ``_free``; ``_idle`` (stored, held by nobody, least recently used
    first); or held by at least one holder. A held slot is *stored* when ``_stored`` leads to it; else it is
    private to its holder (reserved and not committed, committed second, or dropped) and freed by it.

    An arena that was adopted from a dead owner keeps its sealed chunks.
    """

    def __init__(self, arena: Arena, listener: Listener | None = None) -> None:
        self._arena = arena
        self._listener = listener
        self._lock = threading.Lock()
        self._stored: dict[ChunkKey, int] = {}
        self._keys: list[ChunkKey | None] = [None] * arena.slots
        self._free: list[int] = []
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._held: dict[str, dict[int, None]] = {}  # dict as ordered set: the order of a sequence's chunks
        self._hold_counts = [0] * arena.slots
        self._evicted = self._dropped = 0
        self._adopt()

    def _adopt(self) -> None:
        headers = self._arena.headers()
        for slot in range(self._arena.slots - 1, -1, -1):
            key = headers[slot]["key"].tobytes()
            if headers[slot]["state"] == SEALED and key not in self._stored:
                self._keys[slot] = key
                self._idle[slot] = None
                self._insert(key, slot)
            else:
                self._arena.clear(slot)
                self._free.append(slot)

    @property
    def arena(self) -> Arena:
        return self._arena

    def hold_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        """Hold the longest run of ``keys``, from the first, that is stored; return its places."""
        with self._lock:
            slots = []
            for key in keys:
                slot = self._stored.get(key)
                if slot is None:
                    break
                slots.append(slot)
            return self._hold_all(holder, slots)

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Hold those of ``keys`` that are stored; ``None`` for each that is not."""
        with self._lock:
            slots = [self._stored.get(key) for key in keys]
            refs = iter(self._hold_all(holder, [slot for slot in slots if slot is not None]))
            return [None if slot is None else next(refs) for slot in slots]

    def reserve(self, holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
        """Places to write ``keys`` into, held for ``holder`` at once; evicts idle chunks to make room.

        A key that someone has reserved but not committed gets a place of its own: the first commit wins.
        Raises :class:`OverloadedError`, and changes nothing, when too few slots are free or idle.
        """
        with self._lock:
            stored = {key: self._stored[key] for key in keys if key in self._stored}
            needed = sum(key not in stored for key in keys)
            evictable = len(self._idle) - sum(slot in self._idle for slot in stored.values())
            if needed > len(self._free) + evictable:
                raise OverloadedError(
                    f"no room for {needed} chunks in the memory tier: of {self._arena.slots} slots "
                    f"{len(self._free)} are free, {evictable} can be evicted, the rest is in use. "
                    "Try again later, or raise --cold-bytes."
                )
            refs = {key: self._hold(holder, slot) for key, slot in stored.items()}
            return [
                Reservation(key, refs[key], stored=True)
                if key in refs
                else Reservation(key, self._take(holder, key), stored=False)
                for key in keys
            ]

    def commit(self, holder: str, refs: Sequence[tuple[ChunkKey, SlotRef]]) -> None:
        """The bytes of these reserved slots are in place and sealed: from now on others find them.

        Where an equal chunk was stored meanwhile, that one stays and the slot remains private to ``holder``.
        Raises :class:`ChunkLostError`, and stores nothing, if a slot is not the holder's or not sealed.
        """
        with self._lock:
            held = self._held.get(holder, {})
            for key, ref in refs:
                if ref.slot not in held or self._keys[ref.slot] != key:
                    raise ChunkLostError(f"slot {ref.slot} is not reserved by {holder} any more: reserve again")
                if not self._arena.is_sealed(ref, key):
                    raise ChunkLostError(f"slot {ref.slot} was committed by {holder} without a seal: write again")
            for key, ref in refs:
                if key not in self._stored:
                    self._insert(key, ref.slot)

    def drop(self, key: ChunkKey, ref: SlotRef) -> None:
        """The chunk read from ``ref`` was wrong: forget it. Holders keep the slot until they release."""
        with self._lock:
            if self._stored.get(key) != ref.slot or self._arena.generation_of(ref.slot) != ref.generation:
                return  # gone already
            self._remove(key)
            self._dropped += 1
            self._arena.clear(ref.slot)
            if ref.slot in self._idle:
                del self._idle[ref.slot]
                self._make_free(ref.slot)

    def release(self, holder: str) -> None:
        """Let go of all that ``holder`` holds; unknown holders are fine."""
        with self._lock:
            self._release(holder)

    def release_prefix(self, prefix: str) -> int:
        """Release every holder whose name starts with ``prefix``; return how many there were."""
        with self._lock:
            holders = [holder for holder in self._held if holder.startswith(prefix)]
            for holder in holders:
                self._release(holder)
            return len(holders)

    def keys(self) -> list[ChunkKey]:
        """Keys of all stored chunks."""
        with self._lock:
            return list(self._stored)

    def stats(self) -> TierStats:
        with self._lock:
            used = self._arena.slots - len(self._free)
            return TierStats(
                slots=self._arena.slots,
                used_slots=used,
                held_slots=used - len(self._idle),
                stored_chunks=len(self._stored),
                evicted_chunks=self._evicted,
                dropped_chunks=self._dropped,
            )

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError`, saying what is wrong, unless every slot is in exactly one place."""
        with self._lock:
            counts = [0] * self._arena.slots
            for holder, held in self._held.items():
                assert held, f"{holder} is listed and holds nothing"
                for slot in held:
                    counts[slot] += 1
            assert counts == self._hold_counts, "hold counts differ from what the holders hold"
            free = set(self._free)
            assert len(free) == len(self._free), "a slot is free twice"
            for slot, count in enumerate(counts):
                places = [slot in free, slot in self._idle, count > 0]
                assert sum(places) == 1, f"slot {slot} is in {sum(places)} of free, idle, held"
                assert (self._keys[slot] is None) == (slot in free), f"slot {slot}: a key and free, or neither"
            for slot in self._idle:
                assert self._stored.get(self._keys[slot] or b"") == slot, f"slot {slot} is idle and not stored"
            for key, slot in self._stored.items():
                assert self._keys[slot] == key, f"slot {slot} is stored under another key"
                ref = SlotRef(slot, self._arena.generation_of(slot))
                assert self._arena.is_sealed(ref, key), f"slot {slot} is stored and its header does not say so"

    # Below: called with the lock held.

    def _hold(self, holder: str, slot: int) -> SlotRef:
        [ref] = self._hold_all(holder, [slot])
        return ref

    def _hold_all(self, holder: str, slots: list[int]) -> list[SlotRef]:
        # thousands in one call, when a long prompt is found
        if not slots:
            return []
        held = self._held.setdefault(holder, {})
        for slot in slots:
            if slot not in held:
                held[slot] = None
                self._hold_counts[slot] += 1
                self._idle.pop(slot, None)
        generations = self._arena.generation(np.array(slots, np.int64)).tolist()
        return [SlotRef(slot, generation) for slot, generation in zip(slots, generations, strict=True)]

    def _take(self, holder: str, key: ChunkKey) -> SlotRef:
        if self._free:
            slot = self._free.pop()
        else:
            slot, _ = self._idle.popitem(last=False)
            evicted = self._keys[slot]
            assert evicted is not None
            self._remove(evicted)
            self._evicted += 1
        self._arena.renew(slot)
        self._keys[slot] = key
        return self._hold(holder, slot)

    def _release(self, holder: str) -> None:
        # Last chunks first: a prefix is of use without its continuation, not the other way round.
        for slot in reversed(self._held.pop(holder, {})):
            self._hold_counts[slot] -= 1
            if self._hold_counts[slot]:
                continue
            key = self._keys[slot]
            if key is not None and self._stored.get(key) == slot:
                self._idle[slot] = None
            else:
                self._make_free(slot)

    def _make_free(self, slot: int) -> None:
        self._arena.clear(slot)
        self._keys[slot] = None
        self._free.append(slot)

    def _insert(self, key: ChunkKey, slot: int) -> None:
        self._stored[key] = slot
        if self._listener is not None:
            self._listener(key, True)

    def _remove(self, key: ChunkKey) -> None:
        del self._stored[key]
        if self._listener is not None:
            self._listener(key, False)
