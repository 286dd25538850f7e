"""What must stay, and in whose name: chunks that are pinned, slots that are held or promised."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from forecache.workers.errors import OverloadedError
from forecache.workers.memory.format.keys import ChunkKey

TENANT_MARK = "\x1f"
"""Between a tenant's name, which can't hold it, and its own name of a session."""
MOST_NAMED = 5
"""Sessions that a refusal names."""


def tenant_of(name: str) -> str:
    """Whose session has this name; empty where no API keys are asked for."""
    tenant, mark, _ = name.partition(TENANT_MARK)
    return tenant if mark else ""


@dataclass(frozen=True)
class PinLimits:
    """Largest parts of an arena's slots that pins may keep: those of all tenants together, and those of one. Where no
    API keys are asked for there are no tenants, and all may pin what is for all."""

    fraction: float = 0.5
    tenant_fraction: float = 0.25

    def of_all(self, slots: int) -> int:
        return int(self.fraction * slots)

    def of(self, tenant: str, slots: int) -> int:
        """Slots that the tenant may have pinned of so many."""
        return min(self.of_all(slots), int(self.tenant_fraction * slots)) if tenant else self.of_all(slots)


@dataclass(frozen=True)
class PinShare:
    """What a tenant has pinned at one tier, and may, in slots; the same of all tenants, none of which counts for more
    than it may have; the tenant's sessions with most slots."""

    pinned: int
    limit: int
    pinned_by_all: int
    limit_of_all: int
    sessions: tuple[tuple[str, int], ...] = ()

    @property
    def over(self) -> int:
        """Slots that are more than may be pinned."""
        return max(0, self.pinned - self.limit) + max(0, self.pinned_by_all - self.limit_of_all)


class Pins:
    """Names and the keys that each pins; a key may be pinned by several names of one tenant: tenants share no chunk."""

    def __init__(self) -> None:
        self._keys: dict[str, tuple[ChunkKey, ...]] = {}
        self._counts: Counter[ChunkKey] = Counter()
        self._tenants: dict[ChunkKey, str] = {}

    def __contains__(self, key: ChunkKey) -> bool:
        return self._counts[key] > 0

    def set(self, name: str, keys: Sequence[ChunkKey]) -> tuple[ChunkKey, ...]:
        """``name`` pins ``keys`` and nothing else; returns those whose state may have changed."""
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
        """Whose sessions pin ``key``; ``None``: nobody's."""
        return self._tenants.get(key)

    def of_tenant(self, tenant: str) -> dict[str, tuple[ChunkKey, ...]]:
        """Names of a tenant's sessions that pin something, and what."""
        return {name: keys for name, keys in self._keys.items() if tenant_of(name) == tenant}

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` when counts are not those of the names."""
        counts = Counter(key for keys in self._keys.values() for key in keys)
        assert counts == self._counts, "pins are miscounted"
        assert self._tenants.keys() == counts.keys(), "a pin is nobody's, or somebody's is no pin"


class Claims:
    """Pinned chunks that an arena of so many ``slots`` stores and answers for alone: they claim a slot each, also while
    a sequence holds them."""

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
        """``key`` claims a slot for ``tenant``; ``None``: for nobody."""
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
    """Holders and the slots that each holds; a slot may be held by several."""

    def __init__(self, slots: int) -> None:
        self._held: dict[str, dict[int, None]] = {}  # dict as ordered set: the order of a sequence's chunks
        self._counts = [0] * slots

    def holders(self) -> list[str]:
        return list(self._held)

    def of(self, holder: str) -> Collection[int]:
        """In the order in which they were held."""
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
        """``holder`` holds ``slots`` no longer, if it did; returns those that nobody does now."""
        held = self._held.get(holder, {})
        dropped = [slot for slot in dict.fromkeys(slots) if slot in held]
        for slot in dropped:
            del held[slot]
            self._counts[slot] -= 1
        if not held:
            self._held.pop(holder, None)
        return [slot for slot in dropped if not self._counts[slot]]

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` when counts are not those of the holders."""
        counts = Counter(slot for held in self._held.values() for slot in held)
        assert all(self._held.values()), "a holder is listed and holds nothing"
        assert self._counts == [counts[slot] for slot in range(len(self._counts))], "holds are miscounted"


class Quotas:
    """Holders and how many of ``slots`` each may need in all. What is promised and pinned is never more than there is:
    ``pinned`` tells how many slots that nobody holds are; ``unusable``, how many slots are out of use. These may become
    more after they were promised: then nothing more is."""

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
        """Slots that may still be promised, or pinned."""
        return max(0, self._slots - self.total - self._pinned() - self._unusable())

    def reserve(self, holder: str, chunks: int) -> None:
        """Raises :class:`OverloadedError`, and changes nothing, when there is no room."""
        before = self._chunks.get(holder, 0)
        if chunks > self.room + before:
            pinned = self._pinned()
            # answers that end make no room for it: only what is unpinned does
            only_pins = pinned > 0 and chunks > self._slots - self._unusable() - pinned
            help_ = "Let go of pinned sessions" if only_pins else "Try again later"
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
        """As many of ``chunks`` as there is room for, and no fewer than before; returns how many."""
        before = self._chunks.get(holder, 0)
        self.reserve(holder, max(before, min(chunks, self.room + before)))
        return self._chunks[holder]

    def end(self, holder: str) -> None:
        """Unknown holders are fine."""
        self.total -= self._chunks.pop(holder, 0)

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` when more is promised and pinned than there is."""
        assert self.total == sum(self._chunks.values()), "promises are miscounted"
        assert self.total + self._pinned() <= self._slots, "more is promised and pinned than there is"
