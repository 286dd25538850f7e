"""What must stay, and in whose name: chunks that are pinned, slots that are held or promised."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from forecache.workers.errors import OverloadedError
from forecache.workers.memory.keys import ChunkKey


class Pins:
    """Names and the keys that each pins; a key may be pinned by several."""

    def __init__(self) -> None:
        self._keys: dict[str, tuple[ChunkKey, ...]] = {}
        self._counts: Counter[ChunkKey] = Counter()

    def __contains__(self, key: ChunkKey) -> bool:
        return self._counts[key] > 0

    def set(self, name: str, keys: Sequence[ChunkKey]) -> tuple[ChunkKey, ...]:
        """``name`` pins ``keys`` and nothing else; returns those whose state may have changed."""
        before = self._keys.pop(name, ())
        self._counts.subtract(before)
        if keys:
            self._keys[name] = tuple(dict.fromkeys(keys))
            self._counts.update(self._keys[name])
        for key in before:
            if not self._counts[key]:
                del self._counts[key]
        return (*before, *self._keys.get(name, ()))

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` when counts are not those of the names."""
        counts = Counter(key for keys in self._keys.values() for key in keys)
        assert counts == self._counts, "pins are miscounted"


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
        let_go = [slot for slot in dict.fromkeys(slots) if slot in held]
        for slot in let_go:
            del held[slot]
            self._counts[slot] -= 1
        if not held:
            self._held.pop(holder, None)
        return [slot for slot in let_go if not self._counts[slot]]

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` when counts are not those of the holders."""
        counts = Counter(slot for held in self._held.values() for slot in held)
        assert all(self._held.values()), "a holder is listed and holds nothing"
        assert self._counts == [counts[slot] for slot in range(len(self._counts))], "holds are miscounted"


class Promises:
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

    def make(self, holder: str, chunks: int) -> None:
        """Raises :class:`OverloadedError`, and changes nothing, when there is no room."""
        before = self._chunks.get(holder, 0)
        if chunks > self.room + before:
            raise OverloadedError(
                f"no room for the {chunks} chunks that the request may need: of {self._slots} slots of the memory tier "
                f"{self.total - before} are promised to others and {self._pinned()} are pinned"
                f"{self._out_of_use()}. Try again later, lower max_tokens, or raise --cold-bytes."
            )
        self._chunks[holder] = chunks
        self.total += chunks - before

    def _out_of_use(self) -> str:
        return f", {self._unusable()} are out of use" if self._unusable() else ""

    def make_up_to(self, holder: str, chunks: int) -> int:
        """As many of ``chunks`` as there is room for, and no fewer than before; returns how many."""
        before = self._chunks.get(holder, 0)
        self.make(holder, max(before, min(chunks, self.room + before)))
        return self._chunks[holder]

    def end(self, holder: str) -> None:
        """Unknown holders are fine."""
        self.total -= self._chunks.pop(holder, 0)

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` when more is promised and pinned than there is."""
        assert self.total == sum(self._chunks.values()), "promises are miscounted"
        assert self.total + self._pinned() <= self._slots, "more is promised and pinned than there is"
