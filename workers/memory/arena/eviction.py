"""Slots without a holder, in the order of their eviction."""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from enum import Enum, auto


class Idle(Enum):
    """Why a chunk without a holder is kept."""

    COPIED = auto()
    """Another tier, or a disk, answers for it: evicted first."""
    SOLE = auto()
    YIELDING = auto()
    """Pinned, but quotas or pin limits leave no room for it: evicted last."""
    PINNED = auto()
    """Never evicted."""


_PINNED = (Idle.YIELDING, Idle.PINNED)


class IdleSlots:
    """Slots by :class:`Idle` kind, least recently used first, with the tenant of each pinned one."""

    def __init__(self) -> None:
        self._slots: dict[Idle, OrderedDict[int, None]] = {kind: OrderedDict() for kind in Idle}
        self._tenants: dict[int, str] = {}
        self._counts: dict[Idle, Counter[str]] = {kind: Counter() for kind in _PINNED}

    def __contains__(self, slot: int) -> bool:
        return any(slot in slots for slots in self._slots.values())

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))

    def of(self, kind: Idle) -> list[int]:
        """Slots of one kind, least recently used first."""
        return list(self._slots[kind])

    def count(self, kind: Idle) -> int:
        return len(self._slots[kind])

    def count_of(self, kind: Idle, tenant: str) -> int:
        """Slots of a pinned kind that belong to a tenant."""
        return self._counts[kind][tenant]

    def tenants(self, kind: Idle) -> list[str]:
        """Tenants that have slots of a pinned kind."""
        return [tenant for tenant, count in self._counts[kind].items() if count]

    def tenant(self, slot: int) -> str:
        """The tenant of a pinned slot."""
        return self._tenants[slot]

    def is_any_of(self, slot: int, kinds: Sequence[Idle]) -> bool:
        return any(slot in self._slots[kind] for kind in kinds)

    def add(self, slot: int, kind: Idle, tenant: str = "") -> None:
        """Insert ``slot`` as the most recently used. ``tenant``: its owner, if it is pinned."""
        self._slots[kind][slot] = None
        if kind in self._counts:
            self._tenants[slot] = tenant
            self._counts[kind][tenant] += 1

    def discard(self, slot: int) -> None:
        for kind, slots in self._slots.items():
            if slot in slots:
                del slots[slot]
                self._forget(slot, kind)

    def pop(self) -> int:
        """Remove and return the slot to evict next. Raises :class:`KeyError` when there is none."""
        kind = next((kind for kind in (Idle.COPIED, Idle.SOLE) if self._slots[kind]), Idle.YIELDING)
        slot, _ = self._slots[kind].popitem(last=False)
        self._forget(slot, kind)
        return slot

    def change(self, slot: int, kind: Idle, tenant: str = "") -> None:
        """Move ``slot``, if it is idle, to another kind."""
        if slot in self and slot not in self._slots[kind]:
            self.discard(slot)
            self.add(slot, kind, tenant)

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` when the counts differ from the slots."""
        for kind, counts in self._counts.items():
            found = Counter(self._tenants[slot] for slot in self._slots[kind])
            assert found == +counts, f"slots of the {kind.name} are miscounted"

    def _forget(self, slot: int, kind: Idle) -> None:
        if kind in self._counts:
            tenant = self._tenants.pop(slot)
            self._counts[kind][tenant] -= 1
            if not self._counts[kind][tenant]:
                del self._counts[kind][tenant]
