"""What the engine needs of cold memory. `store.py` serves it in-process, `remote.py` through Ray."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from forecache.workers.memory.arena import Arena
from forecache.workers.memory.keys import ChunkKey


@dataclass(frozen=True)
class SlotRef:
    """A slot of an arena as it was when handed out; ``generation`` changes whenever the slot is given away."""

    slot: int
    generation: int


@dataclass(frozen=True)
class Reservation:
    """``ref`` is where to write ``key``; ``stored`` is True when an equal chunk is there already (nothing to write)."""

    key: ChunkKey
    ref: SlotRef
    stored: bool


@dataclass(frozen=True)
class TierStats:
    """Slots are of now, chunks and bytes since start, but for ``stored_chunks``.

    ``pinned_slots`` and ``copied_slots``: of those that nobody holds, which may not be evicted, and which go first.
    """

    slots: int
    used_slots: int
    held_slots: int
    stored_chunks: int
    evicted_chunks: int
    dropped_chunks: int
    pinned_slots: int = 0
    copied_slots: int = 0
    fetched_chunks: int = 0
    fetched_bytes: int = 0
    fetch_s: float = 0.0
    replicated_chunks: int = 0
    moved_chunks: int = 0
    disk_slots: int = 0
    disk_used_slots: int = 0
    spilled_chunks: int = 0
    disk_recalled_chunks: int = 0


class ColdMemory(Protocol):
    """Chunks in CPU memory. Calls may block for a network deadline: only the prefetcher's thread makes them.

    A *holder* is a sequence's name. What it holds is neither evicted nor moved until it is released. Every method
    raises :class:`forecache.workers.errors.ChunkLostError` when the owner of the memory can't be reached.
    """

    @property
    def arena(self) -> Arena:
        """The node's arena, mapped into this process."""
        ...

    def hold_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        """Hold the longest run of ``keys``, from the first, that is stored; return its places."""
        ...

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Hold those of ``keys`` that are stored; ``None`` for each that is not."""
        ...

    def reserve(self, holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
        """Places to write ``keys`` into, held for ``holder`` at once; evicts unheld chunks to make room.

        Raises :class:`forecache.workers.errors.OverloadedError`, and reserves nothing, when all else is held.
        """
        ...

    def commit(self, holder: str, refs: Sequence[tuple[ChunkKey, SlotRef]]) -> None:
        """The bytes of these reserved slots are in place, their headers written: from now on others find them."""
        ...

    def drop(self, key: ChunkKey, ref: SlotRef) -> None:
        """The chunk read from ``ref`` was wrong: forget it everywhere. Holders keep the slot until they release."""
        ...

    def promise(self, holder: str, chunks: int) -> None:
        """``holder`` may need so many slots in all: no more is promised than there is, until it is released.

        Raises :class:`forecache.workers.errors.OverloadedError`, and promises nothing, when there is too little.
        """
        ...

    def release(self, holder: str) -> None:
        """Let go of all that ``holder`` holds; unknown holders are fine."""
        ...

    def record_session(self, session_id: str, keys: Sequence[ChunkKey]) -> None:
        """A request of the session has ended with the chunks ``keys``."""
        ...

    def stats(self) -> TierStats: ...
