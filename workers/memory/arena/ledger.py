"""Accounts of an arena: which chunks are pinned, which slots are held, and how many each holder may need."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from forecache.workers.errors import OverloadedError
from forecache.workers.memory.format.keys import ChunkKey

TENANT_MARK = "\x1f"
"""Separates a tenant's name, which can't contain it, from the tenant's own name of a session."""
MOST_NAMED = 5
"""Sessions that an error message names."""


def tenant_of(name: str) -> str:
    """The tenant of a session; empty where the server uses no API keys."""
    tenant, mark, _ = name.partition(TENANT_MARK)
    return tenant if mark else ""


@dataclass(frozen=True)
class PinLimits:
    """Largest fractions of an arena's slots that pins may keep: of all tenants together, and of each one. Without API
    keys there are no tenants, and only the first limit counts."""

    fraction: float = 0.5
    tenant_fraction: float = 0.25

    def of_all(self, slots: int) -> int:
        return int(self.fraction * slots)

    def of(self, tenant: str, slots: int) -> int:
        """Slots that the tenant may pin of so many."""
        return min(self.of_all(slots), int(self.tenant_fraction * slots)) if tenant else self.of_all(slots)


@dataclass(frozen=True)
class PinShare:
    """What a tenant has pinned at one tier, and its limit, in slots; the same for all tenants together, each counted up
    to its own limit; and the tenant's sessions with most slots."""

    pinned: int
    limit: int
    pinned_by_all: int
    limit_of_all: int
    sessions: tuple[tuple[str, int], ...] = ()

    @property
    def over(self) -> int:
        """Pinned slots beyond the limits."""
        return max(0, self.pinned - self.limit) + max(0, self.pinned_by_all - self.limit_of_all)


class Pins:
    """The keys that each name pins. Several names of one tenant may pin the same key; tenants share no chunk."""

    def __init__(self) -> None:
        self._keys: dict[str, tuple[ChunkKey, ...]] = {}
        self._counts: Counter[ChunkKey] = Counter()
        self._tenants: dict[ChunkKey, str] = {}

    def __contains__(self, key: ChunkKey) -> bool:
        return self._counts[key] > 0

    def set(self, name: str, keys: Sequence[ChunkKey]) -> tuple[ChunkKey, ...]:
        """``name`` pins ``keys`` and nothing else; returns the keys whose state may have changed."""
        before = self._keys.pop(name, ())
        self._counts.subtract(before)
        if keys:
            self._keys[name] = tuple(dict.fromkeys(keys))
            self._counts.update(self._keys[name])
            self._tenants.update(dict.fromkeys(self._keys[name], tenant_of(name)))
        for key in before:
            if not self._counts[key]:
                del self._counts[key]
                del self._tenants[key]
        return (*before, *self._keys.get(name, ()))

    def tenant(self, key: ChunkKey) -> str | None:
        """The tenant that pins ``key``; ``None``: it is not pinned."""
        return self._tenants.get(key)

    def of_tenant(self, tenant: str) -> dict[str, tuple[ChunkKey, ...]]:
        """A tenant's sessions that pin something, and their keys."""
        return {name: keys for name, keys in self._keys.items() if tenant_of(name) == tenant}

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` when the counts differ from the names."""
        counts = Counter(key for keys in self._keys.values() for key in keys)
        assert counts == self._counts, "pins are miscounted"
        assert self._tenants.keys() == counts.keys(), "a pin has no tenant, or a tenant's pin is not counted"


class Claims:
    """Pinned chunks that only this arena of so many ``slots`` answers for. Each claims a slot, also while it is
    held."""

    def __init__(self, slots: int, limits: PinLimits) -> None:
        self._slots = slots
        self._limits = limits
        self._tenants: dict[ChunkKey, str] = {}
        self._counts: Counter[str] = Counter()

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._tenants

    def __len__(self) -> int:
        return len(self._tenants)

    def set(self, key: ChunkKey, tenant: str | None) -> None:
        """``key`` claims a slot for ``tenant``; ``None``: for no tenant."""
        before = self._tenants.pop(key, None)
        if before is not None:
            self._counts[before] -= 1
            if not self._counts[before]:
                del self._counts[before]
        if tenant is not None:
            self._tenants[key] = tenant
            self._counts[tenant] += 1

    def share(self, tenant: str, sessions: dict[str, tuple[ChunkKey, ...]]) -> PinShare:
        """What the tenant claims with ``sessions``."""
        slots = {name: sum(key in self for key in keys) for name, keys in sessions.items()}
        largest = sorted(slots.items(), key=lambda named: -named[1])[:MOST_NAMED]
        return PinShare(
            self._counts[tenant],
            self._limits.of(tenant, self._slots),
            sum(min(count, self._limits.of(each, self._slots)) for each, count in self._counts.items()),
            self._limits.of_all(self._slots),
            tuple((name, count) for name, count in largest if count),
        )


class Holds:
    """The slots that each holder holds; several may hold the same slot."""

    def __init__(self, slots: int) -> None:
        self._held: dict[str, dict[int, None]] = {}  # dict as ordered set: the order of a sequence's chunks
        self._counts = [0] * slots

    def holders(self) -> list[str]:
        return list(self._held)

    def of(self, holder: str) -> Collection[int]:
        """Slots in the order in which ``holder`` got them."""
        return self._held.get(holder, {})

    def count(self, slot: int) -> int:
        """How many hold ``slot``."""
        return self._counts[slot]

    def add(self, holder: str, slots: Sequence[int]) -> None:
        held = self._held.setdefault(holder, {}) if slots else {}
        for slot in slots:
            if slot not in held:
                held[slot] = None
                self._counts[slot] += 1

    def remove(self, holder: str, slots: Sequence[int]) -> list[int]:
        """``holder`` stops holding ``slots``; returns those that have no holder left."""
        held = self._held.get(holder, {})
        dropped = [slot for slot in dict.fromkeys(slots) if slot in held]
        for slot in dropped:
            del held[slot]
            self._counts[slot] -= 1
        if not held:
            self._held.pop(holder, None)
        return [slot for slot in dropped if not self._counts[slot]]

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` when the counts differ from the holders."""
        counts = Counter(slot for held in self._held.values() for slot in held)
        assert all(self._held.values()), "a holder is listed and holds nothing"
        assert self._counts == [counts[slot] for slot in range(len(self._counts))], "holds are miscounted"


class Quotas:
    """How many of ``slots`` each holder may need in all. All quotas and the pinned slots together never exceed the
    arena.

    ``pinned`` returns the number of pinned slots without a holder, ``unusable`` the number of slots out of use. Slots
    may go out of use after their quota was reserved; then no further quota is granted.
    """

    def __init__(self, slots: int, pinned: Callable[[], int], unusable: Callable[[], int] = int) -> None:
        self._slots = slots
        self._pinned = pinned
        self._unusable = unusable
        self._chunks: dict[str, int] = {}
        self.total = 0

    def holders(self) -> list[str]:
        return list(self._chunks)

    @property
    def room(self) -> int:
        """Slots that are left for quotas, or pins."""
        return max(0, self._slots - self.total - self._pinned() - self._unusable())

    def reserve(self, holder: str, chunks: int) -> None:
        """Set the quota of ``holder``. Raises :class:`OverloadedError`, and changes nothing, when there is no room."""
        before = self._chunks.get(holder, 0)
        if chunks > self.room + before:
            pinned = self._pinned()
            # requests that end can't make enough room: only unpinning can
            only_pins = pinned > 0 and chunks > self._slots - self._unusable() - pinned
            help_ = "Unpin sessions" if only_pins else "Try again later"
            raise OverloadedError(
                f"no room for the {chunks} chunks that the request may need: of {self._slots} slots of the memory tier "
                f"{self.total - before} are reserved for others and {pinned} are pinned{self._out_of_use()}. {help_}, "
                "lower max_tokens, or raise --cold-bytes."
            )
        self._chunks[holder] = chunks
        self.total += chunks - before

    def _out_of_use(self) -> str:
        return f", {self._unusable()} are out of use" if self._unusable() else ""

    def reserve_up_to(self, holder: str, chunks: int) -> int:
        """As many of ``chunks`` as there is room for, but never fewer than before; returns the quota."""
        before = self._chunks.get(holder, 0)
        self.reserve(holder, max(before, min(chunks, self.room + before)))
        return self._chunks[holder]

    def end(self, holder: str) -> None:
        """Unknown holders are fine."""
        self.total -= self._chunks.pop(holder, 0)

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` when quotas and pins exceed the arena."""
        assert self.total == sum(self._chunks.values()), "quotas are miscounted"
        assert self.total + self._pinned() <= self._slots, "quotas and pins exceed the arena"
