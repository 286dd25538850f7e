"""Chunks that must stay, and in whose name."""

from collections import Counter
from collections.abc import Sequence

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
