"""The hot pool: a fixed array of chunk slots on the compute device, with reference counts.

A slot is in exactly one of four states:

- *free*: holds nothing;
- *referenced*: in a block table or the target of a copy; never reused;
- *dirty*: completed and unreferenced, but not yet in cold memory; never reused;
- *cached*: clean, unreferenced, found by its key; the least recently used one is evicted first.

Only the engine's thread uses the pool. Other threads copy into and out of slots that are referenced or dirty.
"""

from collections import OrderedDict

import torch

from forecache.workers.errors import ForecacheError
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import ChunkLayout


class HotPool:
    """``slots`` chunks of ``layout`` on ``device``."""

    def __init__(self, layout: ChunkLayout, slots: int, device: torch.device) -> None:
        if slots < 1:
            raise ForecacheError(f"the hot pool needs at least one slot of {layout.nbytes} bytes; raise --hot-bytes")
        self.layout = layout
        self.num_slots = slots
        self.memory = torch.zeros(slots, layout.nbytes, dtype=torch.uint8, device=device)
        self._references = [0] * slots
        self._keys: list[ChunkKey | None] = [None] * slots
        self._dirty = [0] * slots
        self._referenced_slots = self._dirty_slots = 0
        # several slots while equal chunks, computed at the same time, are referenced or being written back
        self._slots_of: dict[ChunkKey, list[int]] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    def view(self, field: str) -> torch.Tensor:
        """Typed view ``[slots, *field shape]``."""
        return self.layout.view(self.memory, field)

    @property
    def available(self) -> int:
        """Slots that :meth:`allocate` can return now."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Slots that are not free."""
        return self.num_slots - len(self._free)

    @property
    def referenced(self) -> int:
        """Slots with at least one reference."""
        return self._referenced_slots

    @property
    def dirty(self) -> int:
        """Slots whose chunk is not in cold memory yet."""
        return self._dirty_slots

    def references(self, slot: int) -> int:
        """Reference count of ``slot``."""
        return self._references[slot]

    def lookup(self, key: ChunkKey) -> int | None:
        """The slot that holds the chunk ``key``; ``None`` if it is not hot."""
        slots = self._slots_of.get(key)
        return slots[0] if slots else None

    def allocate(self) -> int | None:
        """An empty slot with one reference, evicting if needed; ``None`` when there is none."""
        if self._free:
            slot = self._free.pop()
        elif self._cached:
            slot, _ = self._cached.popitem(last=False)
            self._forget(slot)
        else:
            return None
        self._references[slot] = 1
        self._referenced_slots += 1
        return slot

    def acquire(self, slot: int) -> int:
        """Add a reference to a slot that holds a chunk."""
        if self._references[slot] == 0:
            self._cached.pop(slot, None)
            self._referenced_slots += 1
        self._references[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """Remove a reference."""
        assert self._references[slot] > 0, f"slot {slot} is released more often than acquired"
        self._references[slot] -= 1
        if self._references[slot] == 0:
            self._referenced_slots -= 1
            self._settle(slot)

    def complete(self, slot: int, key: ChunkKey, *, dirty: bool) -> None:
        """A referenced slot now holds the chunk ``key``; ``dirty`` when cold memory has no copy of it yet.

        If an equal chunk is hot already, lookups keep finding that one, and this slot is freed once released and clean.
        """
        assert self._references[slot] > 0, f"slot {slot} is completed but not referenced"
        if dirty:
            self._count_dirty(slot)
        self._keys[slot] = key
        self._slots_of.setdefault(key, []).append(slot)

    def hold_back(self, slot: int) -> None:
        """A referenced slot holds a chunk that no lookup may find yet: it is dirty until :meth:`show` and its
        write-back, or until :meth:`mark_clean`."""
        assert self._references[slot] > 0, f"slot {slot} is held back but not referenced"
        self._count_dirty(slot)

    def show(self, slot: int, key: ChunkKey) -> None:
        """The held-back slot holds the chunk ``key``, as in :meth:`complete`; it stays dirty."""
        assert self._dirty[slot] > 0 and self._keys[slot] is None, f"slot {slot} was not held back"
        self._keys[slot] = key
        self._slots_of.setdefault(key, []).append(slot)

    def wipe(self, slots: list[int]) -> None:
        """Fill the bytes of ``slots``, whose content is void, with zeros."""
        if slots:
            self.memory[torch.tensor(slots, device=self.memory.device)] = 0

    def mark_dirty(self, slot: int) -> None:
        """One more write-back of the chunk in ``slot`` has begun."""
        assert self._keys[slot] is not None, f"slot {slot} holds no chunk"
        self._cached.pop(slot, None)
        self._count_dirty(slot)

    def mark_clean(self, slot: int) -> None:
        """A write-back has ended: after the last one the slot may be evicted once unreferenced."""
        assert self._dirty[slot] > 0, f"slot {slot} is clean already"
        self._dirty[slot] -= 1
        if self._dirty[slot] == 0:
            self._dirty_slots -= 1
            self._settle(slot)

    def discard(self, key: ChunkKey) -> None:
        """``key`` is not needed again: free its slots once they are clean and unreferenced."""
        for slot in self._slots_of.pop(key, []):
            self._keys[slot] = None
            self._settle(slot)

    def evict_all(self) -> int:
        """Evict every cached slot; returns how many. For tests and for comparisons with ``policy: full``."""
        count = len(self._cached)
        while self._cached:
            slot, _ = self._cached.popitem(last=False)
            self._forget(slot)
            self._free.append(slot)
        return count

    def _count_dirty(self, slot: int) -> None:
        self._dirty_slots += self._dirty[slot] == 0
        self._dirty[slot] += 1

    def _settle(self, slot: int) -> None:
        if self._references[slot] or self._dirty[slot]:
            return
        key = self._keys[slot]
        if key is not None and self._slots_of[key][0] == slot:
            self._cached[slot] = None
            self._cached.move_to_end(slot)
            return
        self._cached.pop(slot, None)
        if key is not None:
            self._forget(slot)
        self._free.append(slot)

    def _forget(self, slot: int) -> None:
        key = self._keys[slot]
        assert key is not None
        self._slots_of[key].remove(slot)
        if not self._slots_of[key]:
            del self._slots_of[key]
        self._keys[slot] = None

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if a slot is in no state, in two, or found under a wrong key."""
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a slot is free twice"
        assert self._referenced_slots == sum(count > 0 for count in self._references), "referenced slots are miscounted"
        assert self._dirty_slots == sum(count > 0 for count in self._dirty), "dirty slots are miscounted"
        for slot in range(self.num_slots):
            referenced, dirty, key = self._references[slot] > 0, self._dirty[slot] > 0, self._keys[slot]
            states = [slot in free, referenced or dirty, slot in cached]
            assert sum(states) == 1, f"slot {slot}: free, in use, cached = {states}"
            assert self._references[slot] >= 0, f"slot {slot} has {self._references[slot]} references"
            if slot in free:
                assert key is None, f"free slot {slot} has a key"
            if slot in cached:
                assert key is not None and slot in self._slots_of[key], f"cached slot {slot} can't be found"
        for key, slots in self._slots_of.items():
            assert slots, f"key {key.hex()} leads nowhere"
            for slot in slots:
                assert self._keys[slot] == key, f"key {key.hex()} leads to slot {slot}, which holds another chunk"
        named = sum(len(slots) for slots in self._slots_of.values())
        assert named == sum(key is not None for key in self._keys), "a slot has a key that does not lead to it"
