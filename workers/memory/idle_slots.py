"""Slots that nobody holds, in the order in which they should be evicted."""

from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum, auto


class Idle(Enum):
    """Why a chunk that nobody holds is kept."""

    COPIED = auto()
    """Another tier, or a disk, answers for it: evicted first."""
    SOLE = auto()
    YIELDING = auto()
    """Pinned, and promises leave no room for it: evicted last."""
    PINNED = auto()
    """Never evicted."""


class IdleSlots:
    """Slots by :class:`Idle` kind, the least recently used of each first."""

    def __init__(self) -> None:
        self._slots: dict[Idle, OrderedDict[int, None]] = {kind: OrderedDict() for kind in Idle}

    def __contains__(self, slot: int) -> bool:
        return any(slot in slots for slots in self._slots.values())

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))

    def of(self, kind: Idle) -> list[int]:
        """Slots of one kind, least recently used first."""
        return list(self._slots[kind])

    def count(self, kind: Idle) -> int:
        return len(self._slots[kind])

    def is_any_of(self, slot: int, kinds: Sequence[Idle]) -> bool:
        return any(slot in self._slots[kind] for kind in kinds)

    def add(self, slot: int, kind: Idle) -> None:
        """``slot`` was used last of all."""
        self._slots[kind][slot] = None

    def discard(self, slot: int) -> None:
        for slots in self._slots.values():
            slots.pop(slot, None)

    def pop(self) -> int:
        """The slot to evict next. Raises KeyError when there is none."""
        slots = self._slots[Idle.COPIED] or self._slots[Idle.SOLE] or self._slots[Idle.YIELDING]
        slot, _ = slots.popitem(last=False)
        return slot

    def change(self, slot: int, kind: Idle) -> None:
        """``slot``, if it is idle, is of another kind from now on."""
        if slot in self and slot not in self._slots[kind]:
            self.discard(slot)
            self.add(slot, kind)
