"""Cold memory as the engine sees it: in this process (`arena/store.py`) or behind the node's tier (`memory.py`)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.stats import TierStats
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import Reservation, SlotRef

if TYPE_CHECKING:  # it imports Ray, which an engine in one process does without
    from forecache.workers.memory.client.memory import RemoteSpread


class HoldsChunks(Protocol):
    """A place to look for stored chunks: all of cold memory, or this node's part of it."""

    def hold_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        """Hold the longest stored run of ``keys``, from the first; return its slots."""
        ...

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Hold the stored ones of ``keys``; ``None`` for each that is not stored."""
        ...


class ColdMemory(HoldsChunks, Protocol):
    """Chunks in CPU memory. Calls may block for a network deadline: only the prefetcher's threads make them.

    A *holder* is the name of a sequence. What it holds is neither evicted nor moved until it is released. Every method
    raises :class:`forecache.workers.errors.ChunkLostError` when the owner of the memory can't be reached.
    """

    @property
    def arena(self) -> Arena:
        """The node's arena, mapped into this process."""
        ...

    @property
    def spread(self) -> "RemoteSpread | None":
        """Sequences that keep chunks on other nodes; ``None``: every sequence must fit into this arena."""
        ...

    def hold_local_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> tuple[list[SlotRef], bool]:
        """As :meth:`hold_prefix`, limited to this node's memory; never waits for another node. Also returns whether
        the run continues on disk or on other nodes."""
        ...

    def reserve_slots(self, holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
        """Reserve slots to write ``keys`` into, held for ``holder`` at once; evicts chunks that have no holder.

        Raises :class:`forecache.workers.errors.OverloadedError`, and reserves nothing, when too few slots are left.
        """
        ...

    def commit(self, holder: str, refs: Sequence[tuple[ChunkKey, SlotRef]]) -> None:
        """These reserved slots are written and sealed: from now on others find their chunks."""
        ...

    def drop(self, key: ChunkKey, ref: SlotRef) -> None:
        """The bytes read from ``ref`` were wrong: forget the chunk. Holders keep the slot until they release it."""
        ...

    def reserve_quota(self, holder: str, chunks: int) -> None:
        """Reserve a quota of ``chunks`` slots in all for ``holder``, until it is released.

        Raises :class:`forecache.workers.errors.OverloadedError`, and reserves nothing, when the quotas of all holders
        would exceed the arena.
        """
        ...

    def start_over(self, holder: str) -> None:
        """Release the slots and the quota of ``holder``, which stays alive and may ask again."""
        ...

    def release(self, holder: str) -> None:
        """Release all that ``holder`` holds, for good. A later call for it raises
        :class:`forecache.workers.errors.ReleasedError`. Unknown holders are fine."""
        ...

    def record_session(self, session_id: str, keys: Sequence[ChunkKey], state_keys: Sequence[ChunkKey] = ()) -> None:
        """A request of the session has ended with the chunks ``keys``; ``state_keys`` name the pieces of its state
        snapshot."""
        ...

    def stats(self) -> TierStats:
        """Figures of this memory, as they are now."""
        ...
